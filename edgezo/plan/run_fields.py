"""Settings that a run writes for itself, and that no command line gives. Standard library only."""

from __future__ import annotations

from edgezo.plan.field import Field

SET_BY_A_RUN = (
    # Whether --step is only where the automatic step begins (run/auto_step.py).
    Field(name="step_auto", kind="bool", default=False),
    # The time that its chat template writes, so that a resume writes it again.
    Field(name="written_at", kind="str"),
    # The folder that its paths start from (run/places.py).
    Field(name="began_in", kind="str", free_on_resume=True),
    # The rules by which its rows are read (data/sources.py).
    Field(name="row_rules", kind="int", default=2, low=1, high=2),
    # With --for and without --eval-limit, how many rows it evaluates on (plan/evaluated.py).
    Field(name="eval_rows", kind="int", low=1),
    # Of a run that goes on from another one, its parent (run/parent.py): the parent's identity, the steps from the
    # base to where this run begins, and the digest of what the parent had trained.
    Field(name="parent", kind="str"),
    Field(name="parent_steps", kind="int", default=0, low=0, high=10**9),
    Field(name="parent_sha256", kind="str"),
)
