"""Plans a training step on a GPU with fake CUDA tensors: `python benchmarks/fake_gpu.py`, about 2 minutes.

Prints memory compared with an earlier, simpler estimate, the operators of a forward pass and of a step by EMCL variant,
and the bytes sent to other ranks. Needs no GPU; nothing here is measured on one.
"""

from __future__ import annotations

from emcl.config import Config, resolve
from emcl.train.fake_step import DTYPES, FakeStep
from emcl.train.plan import GIB, Plan, memory_parts, plan, planned_steps

LARGE = "model.name=ViT-L-14"
RECOMPUTED = "model.activation_checkpointing=true"
MEMORY: tuple[tuple[str, list[str], int, int], ...] = (
    ("ViT-B-32, 12 frames", [], 8, 16),
    ("ViT-B-32, 64 frames", ["data.frames=64"], 512, 8),
    ("ViT-L-14, 12 frames, recomputed", [LARGE, RECOMPUTED], 8, 16),
    ("ViT-L-14, 64 frames, recomputed", [LARGE, RECOMPUTED, "data.frames=64"], 512, 8),
    ("ViT-L-14, 12 frames", [LARGE], 8, 16),
)
"""Name, settings on top of msrvtt_retrieval, number of GPUs, videos per GPU."""
LAYERS = {"off": ["emcl.enabled=false"], "reference": [], "compact": ["emcl.variant=compact"]}


def main() -> None:
    print("| retrieval, bf16 | GPUs x videos | estimate from the towers | planned | of it |\n|---|---|---|---|---|")
    for name, settings, gpus, videos in MEMORY:
        step_plan, config, step = planned(settings, gpus, videos)
        memory = memory_parts(step_plan, step, config, 0, gpus)
        del memory["optimiser"]
        number = DTYPES[config.precision].itemsize
        estimate = number * (step_plan.parameters + step_plan.trained) + videos * step_plan.activations
        named = ", ".join(f"{item} {size / GIB:.2f}" for item, size in memory.items() if size >= 0.05 * GIB)
        total = sum(memory.values())
        print(f"| {name} | {gpus} x {videos} | {estimate / GIB:.2f} | {total / GIB:.2f} | {named} |")
    print("\n| EMCL | operators forward | in all | messages of a rank, MiB |\n|---|---|---|---|")
    for layer, settings in LAYERS.items():
        _, _, step = planned(settings, 8, 16)
        sent = sum(size for _, size in step.messages.values())
        print(f"| {layer} | {step.forward_operators:,} | {step.operators:,} | {sent / 2**20:.2f} |")


def planned(settings: list[str], gpus: int, videos: int) -> tuple[Plan, Config, FakeStep]:
    chosen = ["model.pretrained=null", f"data.batch_size={gpus * videos}", *settings]
    step_plan, config = plan(resolve(["retrieval"], "msrvtt_retrieval", chosen))
    return step_plan, config, planned_steps(step_plan, config, [gpus])[gpus]


if __name__ == "__main__":
    main()
