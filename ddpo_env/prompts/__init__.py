"""Which prompt an episode is about: distributions over prompts, the named sets, and the words that they are made of."""

from ddpo_env.prompts.distributions import (
    PROMPT_SETS,
    Prompt,
    PromptDistribution,
    PromptFunction,
    PromptSet,
    PromptSource,
    load_prompts,
)

__all__ = ["PROMPT_SETS", "Prompt", "PromptDistribution", "PromptFunction", "PromptSet", "PromptSource", "load_prompts"]
