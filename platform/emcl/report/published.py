"""Figures that papers print, x 100, to stand beside ours: EMCL (Jin et al., NeurIPS 2022) and its README."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One line of a paper's table."""

    model: str
    source: str
    metrics: dict[str, float]
    transductive: bool = False


PAPER, README = "EMCL, NeurIPS 2022", "the reference's README"
NET, NETPP = "EMCL-Net", "EMCL-Net++ (DSL)"


def _both(text_to_video: str, video_to_text: str = "") -> dict[str, float]:
    """From `R@1 46.8, MdR 2` and the like."""
    found = {}
    for direction, text in (("text_to_video", text_to_video), ("video_to_text", video_to_text)):
        for part in filter(None, text.split(", ")):
            name, value = part.split(" ")
            found[f"{direction}/{name}"] = float(value)
    return found


PUBLISHED: dict[tuple[str, str, str], list[Published]] = {
    ("msrvtt", "1k-A", "retrieval"): [
        Published(
            NET, PAPER,
            _both("R@1 46.8, R@5 73.1, R@10 83.1, MdR 2", "R@1 46.5, R@5 73.5, R@10 83.5, MdR 2"),
        ),
        Published(
            NETPP, PAPER,
            _both("R@1 51.6, R@5 78.1, R@10 85.3, MdR 1", "R@1 51.8, R@5 80.2, R@10 88.0, MdR 1"), True,
        ),
        Published("EMCL-Net, 2 GPUs", README, _both("R@1 47.0")),
        Published("EMCL-Net, 8 GPUs", README, _both("R@1 48.2")),
        Published("CLIP2Video + EMCL at inference", README, _both("R@1 46.6", "R@1 44.0")),
    ],
    ("activitynet", "val_1", "retrieval"): [
        Published(NET, PAPER, _both("R@1 41.2, R@5 72.7, MdR 2", "R@1 42.7, R@5 74.0, R@50 98.3, MdR 2")),
        Published(
            NETPP, PAPER,
            _both("R@1 50.6, R@5 78.7, R@50 98.1, MdR 1", "R@1 50.6, R@5 78.9, R@50 98.4, MdR 1"), True,
        ),
    ],
    ("lsmdc", "official", "retrieval"): [
        Published(
            NET, PAPER, _both("R@1 23.9, R@5 42.4, R@10 50.9", "R@1 22.2, R@5 40.6, R@10 49.2, MdR 12"),
        ),
        Published(
            NETPP, PAPER,
            _both("R@1 25.9, R@5 46.4, R@10 53.7, MdR 8", "R@1 26.7, R@5 44.7, R@10 54.4, MdR 8"), True,
        ),
    ],
    ("msvd", "official", "retrieval"): [Published(NET, README, _both("R@1 42.1, R@5 71.3, R@10 81.1"))],
    ("didemo", "paragraph", "retrieval"): [Published(NET, README, _both("R@1 46.8, R@5 74.3, R@10 83.1"))],
    ("msrvtt", "official", "captioning"): [
        Published("EMCL", PAPER, {"BLEU-4": 45.3, "METEOR": 30.2, "ROUGE-L": 63.2, "CIDEr": 54.6})
    ],
    ("msrvtt-qa", "official", "msrvtt_qa"): [Published("EMCL", PAPER, {"accuracy_in_vocabulary": 45.8})],
}  # fmt: skip
"""By benchmark, protocol (as `emcl prepare` names them) and task."""
