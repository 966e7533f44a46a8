"""Settings: one place for each, from flags, files and presets, and back."""

import dataclasses
import json
from pathlib import Path

import pytest

from sparsenet import config as settings
from sparsenet.config import (
    RunConfig,
    SettingsFile,
    changed,
    differences,
    from_dict,
    load,
    recipe,
    replace,
)
from sparsenet.files import write_json
from sparsenet.flags import values
from sparsenet.presets import PRESETS, describe_recipe, preset, preset_for
from sparsenet.zoo import IMAGENET_BLOCKS, architecture


def test_every_setting_has_one_flag_and_a_help_text():
    found = list(settings.settings())
    names = [s.name for s in found]
    assert len(names) == len(set(names))
    assert all(s.help for s in found)


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name):
    config = preset(name)
    assert from_dict(json.loads(json.dumps(config.to_dict())), "file", RunConfig()) == config


def test_the_paper_preset_is_the_published_recipe():
    config = changed(preset("paper"), values({"depth": "100", "growth_rate": "24"}))
    network, optim, data, train = config.network, config.optim, config.data, config.train
    assert (network.fetch, network.depth, network.growth_rate, network.bottleneck) == (
        "sparse",
        100,
        (24,),
        False,
    )
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.drop_1, optim.drop_2) == (
        0.1,
        0.9,
        1e-4,
        150,
        225,
    )
    assert (optim.schedule, optim.label_smoothing, optim.ema, optim.grad_clip) == (
        "step",
        0.0,
        0.0,
        0.0,
    )
    assert (train.batch_size, train.max_epoch, data.mirror, data.shift) == (64, 300, True, 4)


@pytest.mark.parametrize("number", IMAGENET_BLOCKS)
@pytest.mark.parametrize("fetch", ["sparse", "dense"])
def test_the_imagenet_preset_trains_the_named_networks(number, fetch):
    flags = {"blocks": ",".join(map(str, IMAGENET_BLOCKS[number])), "fetch": fetch}
    if number == "161":
        flags["growth_rate"] = "48"
    given = values(flags if (number, fetch) != ("121", "sparse") else {})
    config = changed(preset("imagenet"), given)
    named = architecture(f"{fetch}net{number}", num_classes=config.network.num_classes)
    assert config.network == named
    data, optim, train = config.data, config.optim, config.train
    assert (data.image_size, data.crop, data.stored_size, data.mirror) == (224, 0.08, 320, True)
    assert (train.max_epoch, train.batch_size, optim.lr, optim.weight_decay) == (90, 256, 0.1, 1e-4)
    assert (optim.schedule, optim.label_smoothing) == ("cosine", 0.1)


def test_flags_win_over_files_and_files_over_presets(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"optim": {"lr": 0.3, "ema": 0.5}, "network": {"blocks": [2, 2]}}))
    config = changed(
        settings.load(file, preset("digits")), values({"lr": "0.7", "mirror": "false"})
    )
    assert (config.optim.lr, config.optim.ema, config.optim.schedule) == (0.7, 0.5, "onecycle")
    assert config.data.mirror is False
    assert config.network.stage_depths == (2, 2)
    assert changed(config, values({"depth": "13"})).network.stage_depths == (3, 3, 3)


@pytest.mark.parametrize(
    ("given", "layers", "rates"),
    [
        ({"depth": 13}, (3, 3, 3), (16, 32, 64)),
        ({"blocks": (2, 3, 4)}, (2, 3, 4), (16, 32, 64)),
        ({"blocks": (2, 2), "growth_rate": (4, 8)}, (2, 2), (4, 8)),
        ({"growth_rate": 24}, (6, 6, 6), (24, 24, 24)),
    ],
)
def test_rates_of_stages_that_are_replaced(given, layers, rates):
    network = changed(preset("short"), given).network
    assert (network.stage_depths, network.growth_rates) == (layers, rates)
    with pytest.raises(ValueError, match=r"growth_rate: expected 1 or 2 numbers, one a stage"):
        changed(preset("short"), {"blocks": (2, 2)})


def test_the_preset_follows_the_data():
    assert preset_for("auto", "") == "digits"
    assert preset_for("c10", "somewhere") == "paper"
    assert preset_for("auto", "photos") == "short"
    with pytest.raises(ValueError, match=r"one of paper, .*, finetune, short, found"):
        preset("fast")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"depth": "ten"}, "--depth: expected a whole number, found 'ten'"),
        ({"lr": "fast"}, "--lr: expected a number, found 'fast'"),
        (
            {"growth_rate": "16;32"},
            "--growth_rate: expected whole numbers like 16,32,64, found '16;32'",
        ),
        ({"mirror": "maybe"}, "--mirror: expected true or false, found 'maybe'"),
        ({"batch_size": "-1"}, "batch_size: expected at least 0 and at most 1,000,000, found -1"),
        ({"lr": "nan"}, "--lr: expected a number, found 'nan'"),
        ({"lr": "inf"}, "--lr: expected a number, found 'inf'"),
        ({"lr": "-1"}, "lr: expected a positive number, found -1.0"),
    ],
)
def test_wrong_values_are_named(flags, words):
    with pytest.raises(ValueError) as error:
        changed(RunConfig(), values(flags))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "expected a JSON object"),
        ({"net": {}}, "'net'"),
        ({"optim": {"rate": 1}}, "no setting 'rate'"),
        ({"optim": 3}, "'optim'"),
        ({"network": {"growth_rate": "12"}}, "growth_rate: expected whole numbers, found '12'"),
        ({"network": {"growth_rate": [12.5]}}, "growth_rate: expected whole numbers, found [12.5]"),
        ({"network": {"blocks": ["a"]}}, "blocks: expected whole numbers"),
        ({"network": {"fetch": [0, 1]}}, "fetch: expected a name or a list of lists"),
        ({"train": {"batch_size": True}}, "batch_size: expected a whole number"),
        ({"optim": {"lr": "high"}}, "lr: expected a number, found 'high'"),
    ],
)
def test_a_wrong_file_says_where(value, words):
    with pytest.raises(ValueError, match=r"c\.json") as error:
        from_dict(value, "c.json", RunConfig())
    assert words in str(error.value)


def test_differences_name_what_resuming_must_not_change():
    old = RunConfig()
    new = replace(old, {"optim": {"lr": 0.2}, "train": {"max_epoch": 400, "time_limit": 60.0}})
    assert differences(old, new) == ["lr 0.1 -> 0.2"]
    assert differences(old, dataclasses.replace(old)) == []
    named = replace(old, {"train": {"implementation": "shared"}})
    assert (
        differences(old, named) == []
    )  # what auto came to may not run on the machine of the resume
    assert differences(named, old) == ["implementation 'shared' -> 'auto'"]


def test_a_recipe_makes_the_same_settings_again_but_for_the_machine_and_the_network():
    changes = {
        "data": {"dataset_dir": "/home/me/photos", "cutout": 8},
        "train": {"max_epoch": 7, "device": "cpu"},
    }
    made = replace(RunConfig(), changes)
    told = recipe(made)
    assert "photos" not in str(told) and "cpu" not in str(told)
    again = replace(RunConfig(), told)
    assert again == replace(made, {"data": {"dataset_dir": ""}, "train": {"device": "auto"}})


YAML = """\
# Comments are YAML's.
network: {depth: 16, growth_rate: [4, 8, 16]}
data:
  mirror: no
  dataset_name: "1e3"
optim:
  lr: 5e-2
  weight_decay: 1E-4
train:
  max_epoch: 3
"""


def without(value, name):
    return {key: each for key, each in value.items() if key != name}


@pytest.mark.parametrize("name", PRESETS)
def test_what_an_older_run_did_not_say_was_the_default(name, tmp_path):
    """Of no preset beneath comes, say, another optimizer than the one it was trained by."""
    records = [*(Path(__file__).parents[1] / "results").rglob("config.json")]
    said = [json.loads(file.read_text()) for file in records]
    assert any("optimizer" not in each["optim"] for each in said)
    for file in records:
        assert load(file, preset(name)) == load(file, RunConfig())
    # Of a file of one's own it comes, however many settings that states.
    own, whole = tmp_path / "settings.json", RunConfig().to_dict()
    for stated in ({"optim": {"momentum": 0.8}}, recipe(RunConfig()), without(whole, "optim")):
        write_json(own, stated)
        assert load(own, preset(name)) == replace(preset(name), stated)


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ("https://a.example/w.pth?token=secret", "w.pth"),
        ("https://a.example/b/w.safetensors#sha256=0a", "w.safetensors"),
        ("hf://owner/name", "hf://owner/name"),
        ("/home/me/runs/birds", "birds"),
        ("C:\\runs\\birds", "birds"),
    ],
)
def test_a_recipe_names_weights_and_not_where_they_lie(weights, told):
    config = replace(preset("paper"), {"train": {"weights": weights, "batch_size": 10**6}})
    assert describe_recipe(config, 300) == f"300 epochs, batch size 1000000, from {told}"


def test_a_name_that_comes_twice_is_refused(tmp_path):
    file = tmp_path / "settings.json"
    for text in ('{"optim": {"lr": 0.1, "lr": 0.2}}', '{"optim": {}, "data": {}, "optim": {}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"expected each name once, found '(lr|optim)' again"):
            load(file, RunConfig())
    file.write_text('{"optim": {"lr": 0.1}, "train": {"max_epoch": 2}}')
    assert load(file, RunConfig()).optim.lr == 0.1


def test_yaml_says_what_json_says(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(YAML)
    found = load(file, RunConfig())
    assert (found.network.depth, found.network.growth_rate) == (16, (4, 8, 16))
    assert (found.data.mirror, found.data.dataset_name) == (False, "1e3")
    assert (found.optim.lr, found.optim.weight_decay, found.train.max_epoch) == (0.05, 1e-4, 3)
    assert set(SettingsFile.read(file).asked()) == {
        *("depth", "growth_rate", "dataset_name", "lr", "max_epoch"),
        *(["mirror"] if RunConfig().data.mirror else []),
    }
    whole = tmp_path / "config.yml"  # JSON is YAML
    write_json(whole, RunConfig())
    assert load(whole, RunConfig()) == RunConfig()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("optim: {lr: 0.1}\noptim: {momentum: 0.5}\n", "'optim' for a second time in line 2"),
        ("optim: &a {lr: 0.1}\ntrain: *a\n", "a reference in line 2"),
        ("optim: {lr: .nan}\n", "Out of range float"),
        ("optim: {? [1, 2] : 3}\n", "a key that is no name in line 1"),
        ("optim: !!python/object/apply:os.system [exit]\n", "could not determine a constructor"),
        ("optim: {lr: 0.1\n", "expected ',' or '}', but got"),
        ("data: {dataset_name: 2024-01-01}\n", "date is not JSON"),
        ("optim: {rate: 0.1}\n", "optim has no setting 'rate'"),
        ("optim: {lr: fast}\n", "lr: expected a number, found 'fast'"),
        ("optim:\n", "expected objects named"),
        ("- optim\n", "Expected `object`, got `array`"),
        ("", "Expected `object`, got `null`"),
        ("[" * 100_000, "recursion"),
        ("\x00", "special characters are not allowed"),
    ],
)
def test_yaml_that_says_something_else_is_one_line(tmp_path, text, found):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"settings\.yaml: ") as caught:
        load(file, RunConfig())
    assert found in str(caught.value) and "\n" not in str(caught.value)
