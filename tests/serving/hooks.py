"""What schemathesis sends as a video: a real one. Random bytes are none, and are answered with 400."""

import numpy as np
import schemathesis
from hypothesis import strategies

from emcl.prepare.writer import encode_mp4

NOISE = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
for kind in ("video/mp4", "application/octet-stream"):
    schemathesis.openapi.media_type(kind, strategies.just(encode_mp4(NOISE, 6)))
