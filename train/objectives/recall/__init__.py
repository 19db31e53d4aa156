"""Recall and state tracking: tasks that show what a state can hold, where perplexity hides it.

Every row is made when it is needed, and answers are asked for at some of its positions. To add a task: write a subclass
of `Task`, then add its line to TASKS; from outside the package, see examples/new_task.py.
"""

from .copying import Copying, Induction, Palindrome, SelectiveCopying
from .lookup import Mqar, MultiKey, Phonebook, VariableTracking
from .needle import Needle
from .task import NOT_ASKED, Row, Task, TaskConfig
from .tracking import Parity, Stack, WordProblem

__all__ = ["NOT_ASKED", "TASKS", "Row", "Task", "TaskConfig"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Mqar,
        SelectiveCopying,
        Copying,
        Induction,
        Palindrome,
        Parity,
        WordProblem,
        Stack,
        Phonebook,
        MultiKey,
        VariableTracking,
        Needle,
    )
}
