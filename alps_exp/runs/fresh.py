"""The fresh text of a run: what a distillation trains on beside the calibration windows, free of what judges it."""

from __future__ import annotations

from torch import Tensor

from ..base.errors import UserError
from ..data.fresh import Spoken, fresh_tokens
from ..data.settings import DataSettings, GeneratedSettings
from ..data.texts import lies_here
from ..evaluation.evaluation import Text
from ..evaluation.protocol import Prepared
from .settings import Settings
from .workspace import Workspace


def fresh_text(
    settings: Settings, tokens: Tensor, prepared: Prepared, workspace: Workspace
) -> tuple[Tensor | None, dict, list[str]]:
    """Windows that share no text with those that are held out or evaluated on.

    Those of another data set share none with the calibration windows either. Texts of tasks are not known here.

    Args:
        settings: the run's.
        tokens: its windows, as `Workspace.calibration` gives them.
        prepared: what it is evaluated on.
        workspace: where the tokenizer and the model are.

    Returns:
        Tokens (windows, seqlen), None where the run asks for none by `finish.tokens`; where they came from; warnings.

    Raises:
        UserError: the text is too short.
    """
    asked, own = settings.fresh, settings.calibration
    if settings.finish.tokens is None:
        return None, {}, []
    drawn = own.divided(tokens)
    judging = [drawn.held_out, *(text.windows for text in prepared.texts)]
    if asked is None:  # of the calibration's own data set, drawn with its windows
        kept, left_out = _free(drawn.fresh, Spoken(judging), own.data)
        facts = {"dataset": own.data.name, "windows": len(kept), "seqlen": own.seqlen, "left_out": left_out}
        return kept, facts, _warnings(left_out, len(drawn.fresh))
    spoken = Spoken([drawn.calibration, *judging])
    if isinstance(asked.data, GeneratedSettings):
        windows, facts = workspace.generated(settings, asked)
        kept, left_out = _free(windows, spoken, asked.data)
        facts |= {"windows": len(kept), "left_out": left_out}
        return kept, facts, _warnings(left_out, len(windows))
    kept, facts = fresh_tokens(
        asked.data,
        workspace.tokenizer(settings),
        windows=asked.fresh,
        seqlen=asked.seqlen,
        seed=asked.seed,
        spoken=spoken,
        bos=asked.bos,
        vocabulary=settings.model.vocabulary,
    )
    return kept, facts, []


def refuse_too_little(settings: Settings, workspace: Workspace) -> str:
    """Draw the text that a planned run would train on, unless that takes the network or the model.

    Returns:
        What only the run can tell, and why; empty where all is well.

    Raises:
        UserError: the text is too short.
    """
    own = settings.calibration.data
    asked = settings.fresh.data if settings.fresh is not None else own
    if any(isinstance(data, GeneratedSettings) for data in (own, asked)):
        return "the run writes it itself"
    judging = settings.evaluation.texts
    read = [*((data, None, False) for data in (own, asked)), *((text.data, text.path, True) for text in judging)]
    for data, path, evaluates in read:
        if not lies_here(data, path, evaluates):
            return f"whether data={data.name}, which is not on this machine yet, has so much text, the run will see"
    tokens, _ = workspace.calibration(settings)
    texts = [Text(text.data.name, *workspace.evaluation(settings, text)) for text in judging]
    fresh_text(settings, tokens, Prepared(texts, ()), workspace)
    return ""


def _free(windows: Tensor, spoken: Spoken, data: DataSettings) -> tuple[Tensor, int]:
    """The windows that share nothing with what is spoken for, and how many others there are."""
    taken = spoken.within(windows)
    if bool(taken.all()):
        raise UserError(
            f"finish.tokens: all {len(windows)} windows of data={data.name} share text with what is held out or "
            "evaluated on: give another text with finish.data or finish.path"
        )
    return windows[~taken], int(taken.sum())


def _warnings(left_out: int, windows: int) -> list[str]:
    if not left_out:
        return []
    return [
        f"{left_out} of {windows} windows of fresh text were left out of the distillation: they share text with what "
        "is held out or evaluated on"
    ]
