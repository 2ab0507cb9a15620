"""The file of contenders: what it expands to, and what it must not say."""

from collections import Counter
from pathlib import Path

import pytest

from agents.commands.race.contenders import read_contenders
from agents.config.algorithms import ALGORITHMS
from agents.config.command_line import parse_command_line
from agents.config.resolve import resolve

LINE = ("--samples-per-iteration=8", "--sample-batch-size=4")


@pytest.fixture
def read(tmp_path):
    """Read contenders from text, with a command line."""

    def read_text(text, *arguments):
        path = tmp_path / "contenders.yaml"
        path.write_text(text)
        return read_contenders(path, parse_command_line(arguments).config, tmp_path)

    return read_text


def test_a_list_of_learning_rates_makes_one_contender_of_each(read):
    text = """
    base: {samples_per_iteration: 16, eval_samples: 6}
    contenders:
      ppo: {learning_rate: [1e-3, 2.5e-3, 2.5e1]}
      nft: {algorithm: nft, timestep_window: [0, 0.5]}
      plain:
    """
    found = read(text, *LINE)
    assert [(one.name, one.family) for one in found] == [
        ("ppo-0.001", "ppo"),
        ("ppo-0.0025", "ppo"),
        ("ppo-25", "ppo"),
        ("nft", "nft"),
        ("plain", "plain"),
    ]
    assert [one.config.learning_rate for one in found] == [1e-3, 2.5e-3, 25, None, None]
    nft = found[3].config
    assert (nft.algorithm, nft.update.timestep_window) == ("nft", (0, 0.5))
    assert nft.samples_per_iteration == 8  # the command line comes before the file's base
    assert nft.run.eval_samples == 6  # which comes before the defaults


def test_base_comes_before_the_preset(read):
    (one,) = read("base: {learning_rate: 1e-3}\ncontenders: {a: {}}", "--preset=tiny-alignment")
    assert (one.config.learning_rate, one.config.samples_per_iteration) == (1e-3, 144)
    assert one.config.reward == "vlm_alignment"


def test_contender_with_another_algorithm_than_the_preset_has_the_defaults_of_its_own(read):
    text = """
    contenders:
      ppo: {}
      nft: {algorithm: nft}
      slow: {algorithm: nft, learning_rate: 1e-3, updates_per_iteration: 2}
    """
    found = [resolve(one.config) for one in read(text, "--preset=tiny-alignment")]
    assert [(one.learning_rate, one.training.updates_per_iteration) for one in found] == [
        (2e-3, 2),
        (3e-3, 1),
        (1e-3, 2),
    ]
    (shared,) = read("base: {updates_per_iteration: 2}\ncontenders: {nft: {algorithm: nft}}", "--preset=tiny-alignment")
    assert resolve(shared.config).training.updates_per_iteration == 2


def test_what_all_share_need_not_have_an_effect_on_each(read):
    text = """
    base: {clip_range: 0.1}
    contenders: {ppo: {}, nft: {algorithm: nft}, own: {algorithm: nft, clip_range: 0.2}}
    """
    ppo, nft, own = (one.config for one in read(text, "--stat-min-count=4"))
    assert resolve(nft).training.clip_range == resolve(ppo).training.clip_range == 0.1
    with pytest.raises(ValueError, match="clip_range must not be given with nft"):
        resolve(own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "section contenders"),
        ("contenders: {}", "at least one"),
        ("contender: {a: {}}", "section contenders"),
        ("bases: {}\ncontenders: {a: {}}", "base and contenders; got 'bases'"),
        ("contenders: {a: {}, a: {}}", "line 1: 'a' must occur once"),
        ("contenders: {a: {}, A: {}}", "must differ.*got 'a' twice"),
        ("contenders: {a: {learning_rate: [1e-3]}, a-0.001: {}}", "got 'a-0.001' twice"),
        ("contenders: {a: {learning_rate: [1e-3, 0.001]}}", "contender 'a': each learning_rate must occur once"),
        ("contenders: {a: {learning_rate: [fast]}}", r"contender 'a': learning_rate .* got \['fast'\]"),
        ("contenders: {a: {learning_rate: -1}}", "contender 'a': learning_rate must be .*got -1"),
        (
            "contenders: {a: {lerning_rate: 1}}",
            "contender 'a'.*valid are adam_beta1, .*, epochs.*did you mean learning_rate",
        ),
        ("contenders: {a: {reward: jpeg_compressibility}}", "must not set reward, which all contenders share"),
        ("contenders: {a: {seed: 3}}", "contender 'a' must not set seed"),
        ("base: {iterations: 3}\ncontenders: {a: {}}", "base must not set iterations"),
        ("contenders: {a: {model_sha256: '0'}}", "there is no setting 'model_sha256'; valid are"),
        ("contenders: {../a: {}}", "contender '../a': a name must have"),
        ("contenders: {a: 3}", "contender 'a' must hold settings by name; got 3"),
        ("base: {reward: 'os:system'}\ncontenders: {a: {}}", "base: reward would use code.*--reward"),
        ("contenders: {a: !!python/object/apply:os.system [ls]}", "tags are not valid"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_code_may_be_named_on_the_command_line(read):
    (one,) = read("contenders: {a: {}}", "--reward=os:system")
    assert one.config.reward == "os:system"


@pytest.mark.parametrize("flag", ["--iterations=3", "--seed=1", "--run-dir=x", "--resume=x"])
def test_what_the_race_sets_is_refused_on_the_command_line(read, flag):
    with pytest.raises(ValueError, match=f"{flag[2:].partition('=')[0].replace('-', '_')} must not be given to a race"):
        read("contenders: {a: {}}", flag)


def test_the_bundled_file_names_every_algorithm():
    """What scripts/experiments/race/contenders.yaml promises in docs/race.md."""
    from helpers.paths import SCRIPTS

    path = SCRIPTS / "experiments" / "race" / "contenders.yaml"
    found = read_contenders(path, parse_command_line(["--preset=tiny-alignment"]).config, Path("races"))
    assert {one.config.algorithm for one in found} == ALGORITHMS.keys() - {"draft"}  # it needs a differentiable reward
    families = Counter(one.family for one in found)
    assert set(families.values()) == {3}  # learning rates
    assert len(families) == 9
