r"""Answer equality: equal, different, or undecided.

grade(answer=r"\boxed{\frac12}", reference="0.5").value  # "equal"
"""

from __future__ import annotations

from shared.grading.extract import last_boxed
from shared.grading.grader import Grade, Grader, grade
from shared.grading.verdict import Stage, Value

__all__ = ["Grade", "Grader", "Stage", "Value", "grade", "last_boxed"]
