"""Where the prompts of episodes come from.

In comes the name of a prompt set, a text file, a list or a function; out goes a distribution, from which every episode
samples a prompt and its metadata.
"""

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
