"""How captions are scored: by pycocoevalcap, over all references of each video."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from emcl.tasks.captioning_report import DRAWN, Captioned, draw_captions

from emcl.errors import UserError
from emcl.metrics.caption_metrics import COUNTS, CaptionScores, caption_metrics
from emcl.model.backbone import Encoded
from emcl.model.model_settings import Generation
from emcl.run_folder import CAPTIONS
from emcl.task import Record, Scorer, Scores


class CaptionScorer(Scorer):
    """Its records are captions, one a video."""

    def update(self, encoded: Encoded, inputs: Any | None, rows: Sequence[int]) -> None:
        captions = self.evaluation.run(partial(self.task.generate, encoded))
        if inputs is not None:
            self.records += zip(rows, captions, strict=True)

    def compute(self, records: list[Record]) -> Scores:
        sample, written = self.evaluation.sample, dict(records)
        scored = {row: caption for row, caption in written.items() if sample(row).captions}
        if not scored:
            raise UserError("no video of this split has a reference caption")
        results = caption_metrics(
            {str(row): caption for row, caption in scored.items()},
            {str(row): sample(row).captions for row in scored},
        )
        suffix = "" if results.tokenizer == "ptb" else f"_{results.tokenizer}_tokens"
        drawn = list(scored)[:: max(1, len(scored) // DRAWN)][:DRAWN]
        examples = [Captioned(row, scored[row], sample(row).captions) for row in drawn]
        predictions = [{"image_id": sample(row).id, "caption": caption} for row, caption in written.items()]
        return Scores(
            {f"{name}{suffix}": 100 * value for name, value in results.metrics.items()},
            _protocol(len(scored), results, self.task.settings.generation),
            chosen=f"CIDEr{suffix}",
            picture=partial(draw_captions, examples, self.evaluation.title),
            items={
                "id": [sample(row).id for row in scored],
                "caption": list(scored.values()),
                "reference": [sample(row).captions[0] for row in scored],
                COUNTS: results.counts,
                **{f"{name}{suffix}": [100 * value for value in values] for name, values in results.each.items()},
            },
            files={CAPTIONS: json.dumps(predictions, indent=0, ensure_ascii=False)},
        )


def _protocol(videos: int, results: CaptionScores, how: Generation) -> str:
    words = "sampled" if how.do_sample else "greedy" if how.num_beams == 1 else f"beam {how.num_beams}"
    tokens = {"ptb": "PTB tokenizer", "plain": "PLAIN TOKENIZER, not comparable with published scores"}
    gone = f"; without {results.missing}" if results.missing else ""
    return f"{videos} videos, all references, scores x 100, {tokens[results.tokenizer]}; {words}{gone}"
