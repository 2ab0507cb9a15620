"""The results as a document."""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from measuring.figures import processor

_THING = r"(prompt|text|task_prompt|images?|image_embeds|masked_image_latents)"
_REASONS = {
    r"must be a pipeline with a scheduler|has no attribute 'scheduler'": (
        "It has no scheduler, no denoiser named `transformer` or `unet`, or no latents of its own"
    ),
    r"must have one denoiser": "It has two denoisers",
    r"ImportError|NameError: name '\w+' is not defined|\.json|Can't load": (
        "The tiny model needs a package or a file that is not installed"
    ),
    r"^tiny model": "diffusers' tests build no tiny model that works here",
    r"^(time|process)": "It was not finished in time, or its process ended",
    rf"{_THING}[`' ].*(must|has to|need|Cannot|Please|provide)|(either|Must|Cannot|Please) (provide|`)": (
        "Its call does not take an encoded prompt in place of the text, or takes other things only together with it"
    ),
    r"WithDtype": "Its call encodes the text again",
    r"fixed length|take a mask|has shape": "Its encoded prompts have no fixed shape and no mask",
    r"no attribute '(asked|output)'|output has shape": (
        "Its scheduler steps on a part of the latents, or there are several schedulers"
    ),
    r"^unguided DifferentError": (
        "Our path ends elsewhere: it changes the latents between the steps, does not start from noise, or looks up "
        "more in its scheduler than timesteps"
    ),
    r"^rows DifferentError": "A row depends on the others, or gradients are not finite",
}
"""Pattern of the check and its error → what it means; the first one that fits counts."""
_OTHER = "Other errors"
_UNTESTED = "diffusers' tests do not build it"


_HEAD = """# Which pipelines can be trained

{passed} of {all} pipelines of diffusers pass every check below; {unguided} of them without guidance only, because their
guidance has a form of its own. The tests of diffusers name {tested} pipelines, and tiny random models come from there.

The machine had {cores} cores of an {processor} and no GPU: Python {python}, torch {torch}, diffusers {diffusers},
transformers {transformers}, {date}.

<!-- not run: it downloads the tests of diffusers -->
```bash
git clone --depth 1 https://github.com/huggingface/diffusers
python scripts/benchmarks/pipelines.py --tests diffusers/tests --output docs/pipelines.md
```

A pipeline passes if

* two rows with two prompts at two timesteps have the outputs that each has alone, and every gradient of the denoiser's
  weights is finite. The column *rows* has the largest difference;
* our path ends in the pipeline's own latents and samples, from the same noise and prompt. A step of our path is the
  denoiser's output as it is watched, and then a step of the pipeline's own scheduler. The columns have the largest
  difference of the last latents, without guidance and with it. *none*: the pipeline has no guidance. *embedded*: the
  scale is an input of the denoiser. *differs* and *fails*: use it without guidance;
* decoded samples are finite;
* the sampler reads its table off the pipeline's scheduler, or off the one that is put in its place.

A difference of up to 1e-4 of the largest value passes; values below 1 count as 1. Image-to-image pipelines run with
`strength=1`. Text encoders and tokenizers that the tests of diffusers download are replaced by random ones. *Calls*
says which rows one call of the pipeline takes: any, those of one timestep, or one row.

| pipeline | sample | calls | rows | without guidance | with guidance | scheduler |
| --- | --- | --- | --- | --- | --- | --- |
"""


def document(results: Mapping[str, Mapping[str, Any]], untested: list[str], date: datetime.date) -> str:
    """Return the document in Markdown.

    Args:
        results: by pipeline, see `tiny_pipelines.checks.Found`.
        untested: pipelines without a test that builds them.
        date: of the run.
    """
    passed = {name: one for name, one in results.items() if one["failed"] in ("", "guided")}
    groups: dict[str, list[str]] = {_UNTESTED: [f"`{name}`" for name in untested]}
    for name, one in results.items():
        if name not in passed:
            groups.setdefault(_meaning(one), []).append(f"`{name}` ({one['failed']}: {_short(one['reason'])})")
    text = _HEAD.format(
        passed=len(passed),
        all=len(results) + len(untested),
        unguided=sum(one["failed"] == "guided" for one in passed.values()),
        tested=len(results),
        cores=os.cpu_count(),
        processor=processor(),
        python=platform.python_version(),
        date=date.isoformat(),
        **{name: version(name) for name in ("torch", "diffusers", "transformers")},
    )
    for name, one in sorted(passed.items()):
        figures = one["figures"]
        without = "differs" if one["reason"].startswith("DifferentError") else "fails"
        guidance = figures.get("guided", without)
        cells = (*(figures[key] for key in ("decoded", "calls", "rows", "unguided")), guidance, figures["sampler"])
        text += f"| ✓ `{name}` | {' | '.join(map(_number, cells))} |\n"
    text += "\n## What does not pass, and why\n"
    for meaning, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        text += f"\n**{meaning}** ({len(names)}): {'; '.join(names)}.\n" if names else ""
    return text


def _meaning(result: Mapping[str, Any]) -> str:
    text = f"{result['failed']} {result['reason']}"
    return next((meaning for pattern, meaning in _REASONS.items() if re.search(pattern, text)), _OTHER)


def _short(reason: str) -> str:
    """Return the beginning of an error on one line, without objects' addresses."""
    line = re.sub(r"<[^>]*>|\s+|\|", " ", reason.replace("DifferentError: ", "")).strip()
    return line if len(line) <= 110 else line[:107].rsplit(" ", 1)[0] + " ..."


def _number(value: Any) -> str:
    return (f"{value:.0e}" if value else "0") if isinstance(value, float) else str(value)
