"""What a task says of itself, in tasks/ or in anyone's package; everything else is the platform's."""

from emcl.task.base import Task
from emcl.task.prediction import Compares, Offer, Prediction
from emcl.task.scorer import Evaluation, Lockstep, Record, Scorer, Scores
from emcl.task.task_report import Case, Published, Shown, Table, TaskReport, Variant
from emcl.task.task_result import Result

__all__ = [
    "Case",
    "Compares",
    "Evaluation",
    "Lockstep",
    "Offer",
    "Prediction",
    "Published",
    "Record",
    "Result",
    "Scorer",
    "Scores",
    "Shown",
    "Table",
    "Task",
    "TaskReport",
    "Variant",
]
