"""Expectation-Maximization Contrastive Learning: decompositions of embeddings, and scores of pairs.

This folder needs only torch and nothing else of this project, so it can be copied into any code base. (NumPy is used
for features that are given so, and to keep shared factors.)

    layer = EMCL(variant="compact", bases=32)
    video, text = layer(video, text)                        # in a training loop: (n, D) rows each, corrected
    EMCL(variant="compact").fit(video, text).transform(x)   # on features of any model, NumPy or torch
    SharedFactors().fit(video, text, owner).score(text, video)  # of each text with each video: (m, n)

Legend: N feature rows, D width (D_v of videos, D_t of texts), K bases.

Three forms, by what EM looks at: `reference` and `compact` correct rows (`layer.py`), the shared factors score pairs
(`shared.py`, with `pairs.py` for their moments, `correlation.py` for EM, `folds.py` for the shrinkage).

The first two are one method: EM finds K bases Z (D, K) of the latent space from the rows X (N, D), every row is
reconstructed from them, and the reconstruction is added to it::

    output = x + beta x_hat,    x_hat = Z diag(w) Z^T x - |x| c          with weights w (K,) and an offset c (D,)

They differ in the model that EM fits. Rows enter it only through their moments, G = sum x x^T, s = sum x and N:
one pass over the rows however many iterations follow, one message between ranks, exact on any number of them.

`reference` is the published algorithm (Jin et al., NeurIPS 2022, section 3.2, with the details of its code): features
d are softly assigned to bases. From M[n, k] = mu[k], T times::

    Z = softmax_k(X^T M / temperature)        E-step: responsibility of basis k for feature d
    Z[:, k] /= 1e-6 + sum_d Z[d, k]
    M = X Z                                   M-step
    M[:, k] /= 1e-6 + |M[:, k]|
    X_hat = M Z^T,   mu <- momentum mu + (1 - momentum) mean_n M[n, :]     (mu in training only)

By X^T M = G Z / (1e-6 + |M|), |M[:, k]|^2 = Z[:, k]^T G Z[:, k] and X^T M = s mu^T at the start, the same numbers
follow from the moments; w = 1 / |M[:, k]| and c = 0. X_hat is a constant to autograd, as published. Its bases
collapse (two are distinct), X_hat fades as 1 / sqrt(N), and it is fitted anew on whatever rows are compared.

`compact` does what the paper intends. EM fits K directions to the directions u = x / |x| of the rows, centred within
each modality (each counts alike, however many rows it has), by alternating least squares, the noise-free limit of EM
for probabilistic PCA (Roweis, NeurIPS 1997; Tipping and Bishop, 1999)::

    codes  A = U Z (Z^T Z)^-1                 E-step: the best codes given the bases
    bases  Z = U^T A (A^T A)^-1               M-step: the best bases given the codes; then orthonormal

The objective, the mean squared reconstruction error |U - A Z^T|^2 / N, never rises from one iteration to the next. With
the variance v_k of the codes of basis k and the mean direction m,

    x_hat = |x| sum_k Z_k v_k^(-balance/2) (u - m).Z_k / r        c = Z diag(w) Z^T m

where r makes |x_hat| as large as |x| over the fitted rows (root mean square), so beta alone says how strong the
correction is, at any N and any scale of X. `balance` 0 keeps the spectrum of the features, 1 lets every basis
contribute alike. The moments are a moving sum over the training batches (momentum); in evaluation the bases are fixed,
so a row's embedding depends on that row alone. Gradients flow through x_hat.

`SharedFactors` looks at what those two ignore, which video goes with which text: K factors z generate both modalities
(probabilistic CCA; Bach and Jordan, 2005). With the directions around the means m_v of videos and m_t of texts,

    u_v = (v - m_v) / |v - m_v|,  x = u_v - mean u_v      u_t = (t - m_t) / |t - m_t|,  y = u_t - mean u_t
    C_v = mean x x^T over videos    C_t = mean y y^T over texts    C_tv = mean over videos of (mean y of its texts) x^T
    S_v = C_v + s_v (tr C_v / D_v) I                      S_t = C_t + s_t (tr C_t / D_t) I
    z ~ N(0, 1),  x = W_v z + noise,  y = W_t z + noise   with the covariances S_v and S_t in all

EM in its noise-free limit is again alternating least squares, on M = S_t^(-1/2) C_tv S_v^(-1/2)::

    P = orth(M Q)                             E-step: codes of the texts given the bases of the videos
    Q = orth(M^T P)                           M-step: and the reverse; |M Q|_F never falls

and with M Q = U diag(r) R^T the bases are B_t = S_t^(-1/2) U and B_v = S_v^(-1/2) Q R, the codes a = B_t^T y and
b = B_v^T x, and the log-likelihood ratio of "they have one z" against "each has its own", without its constant,

    LLR(t, v) = sum_k w_k a_k b_k - q_k (a_k^2 + b_k^2)    w = r / (1 - r^2),  q = r^2 / (2 (1 - r^2))
              = [sqrt(w) a, 1, -q.a^2] . [sqrt(w) b, -q.b^2, 1]

The squares lower what is close to everything (hubs). Both are log-odds, so exp(logit_scale) cos + LLR is a score too.
"""

from .layer import EMCL, Correction, fit_compact, fit_reference
from .moments import AllReduce, Moments
from .pairs import Block, Blocks
from .shared import SharedFactors

__all__ = [
    "EMCL",
    "AllReduce",
    "Block",
    "Blocks",
    "Correction",
    "Moments",
    "SharedFactors",
    "fit_compact",
    "fit_reference",
]
