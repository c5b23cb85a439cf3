"""Training runs over HTTP: which there are, their numbers as they come, what is wrong with them, and their sheets."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from dalle.serving.diagnosis import diagnose
from dalle.serving.errors import ServingError
from dalle.serving.state import State
from dalle.serving.watch import MAX_STEP, SHEETS, Look, Run, Runs, StageState


def router(state: State) -> APIRouter:
    """The routes beneath /api/runs; ValueError when the settings' folder of runs is none."""
    routes = APIRouter(prefix="/api/runs", tags=["training"])
    runs = None if state.settings.runs is None else Runs(state.settings.runs)

    def find(id: str) -> Run:
        run = None if runs is None else runs.get(id)
        if run is None:
            raise ServingError(404, "there is no such training run", code="not_found")
        return run

    @routes.get("")
    def list_runs() -> dict[str, Any]:
        """Every run beneath the watched folder, the last changed first."""
        found = [] if runs is None else [summary(run, run.look()) for run in runs.all()]
        return {"runs": sorted(found, key=lambda run: -run["updated_at"])}

    @routes.get("/{id}")
    def read_run(id: str, since: Annotated[int, Query(ge=0, le=MAX_STEP)] = 0) -> dict[str, Any]:
        """A run; of its numbers those that came after `since`, which is the `next` of the last answer."""
        run = find(id)
        look = run.look()
        is_reset = since < look.rewritten_at or since > look.end
        rows = [row for row in look.rows if is_reset or row.end > since]
        return summary(run, look) | {
            "stages": [_stage(stage) for stage in look.stages],
            "metrics": [{"stage": row.stage, "step": row.step, **row.values} for row in rows],
            "next": look.end,
            "reset": is_reset and since > 0,
            "remarks": [
                {"severity": it.severity, "stage": it.stage, "text": it.text, "why": it.why}
                for it in diagnose(look, time.time())
            ],
            "sheets": [
                {
                    "url": f"/api/runs/{run.id}/sheets/{sheet.name}.png",
                    "stage": sheet.stage,
                    "step": sheet.step,
                    "kind": SHEETS[sheet.stage],
                }
                for sheet in look.sheets
            ],
            "codebook": _codebook(look),
            "problems": look.problems,
        }

    @routes.get("/{id}/sheets/{name}.png")
    def read_sheet(id: str, name: str) -> Response:
        """A sheet that the run drew; `name` is one of the listing's."""
        try:
            data = find(id).sheet(name)
        except (ValueError, OSError) as error:
            raise ServingError(404, "the sheet cannot be read", code="not_found") from error
        if data is None:
            raise ServingError(404, "there is no such sheet", code="not_found")
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, no-cache"})

    return routes


def summary(run: Run, look: Look) -> dict[str, Any]:
    """A run in the listing: its stage is the one that trained last."""
    newest = next((stage for stage in reversed(look.stages) if stage.step), None)
    return {
        "id": run.id,
        "name": look.name,
        "stage": None if newest is None else newest.stage,
        "step": 0 if newest is None else newest.step,
        "updated_at": look.updated_at,
    }


def _stage(state: StageState) -> dict[str, Any]:
    return {"stage": state.stage, "status": state.status, "step": state.step, "steps": state.steps}


def _codebook(look: Look) -> dict[str, Any] | None:
    """How much of the codebook the dVAE uses, as last measured; None where no dVAE was trained."""
    rows = look.of("dvae")
    n_codes = next((stage.model.get("n_codes") for stage in look.stages if stage.stage == "dvae"), None)
    if not rows:
        return None

    def newest(name: str) -> float | None:
        values = (row.values.get(name) for row in reversed(rows))
        return next((value for value in values if value is not None), None)

    return {
        "n_codes": n_codes if isinstance(n_codes, int) else None,
        "share_used": newest("validation_codes_used"),
        "perplexity": newest("perplexity"),
    }
