"""A model as one file: the same logits and text elsewhere, and one line for what is wrong."""

import builtins
import dataclasses
import errno
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types
import wave
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from etils import epath

import speech_jax
from speech_jax import bundle, models, tasks
from speech_jax.deploy import acoustic, export, onnx, onnx_graph, onnx_primitives, sjx
from speech_jax.models.frontend import FrontEnd
from speech_jax.tasks.recognize import Recognize
from test_encoders import CASES

CLOSE = 1e-4


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory) -> dict[str, pathlib.Path]:
    """The trained model by kind: its workdir, and what the command made of it."""
    folder = tmp_path_factory.mktemp("exported")
    made = {"workdir": finished.workdir.folder}
    for name, flags in {"m.sjx": [], "m.onnx": [], "int8.sjx": ["--weights=int8"]}.items():
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert export.main([str(made["workdir"]), str(folder / name), *flags]) == 0
        made[name] = folder / name
    assert sorted(path.name for path in folder.iterdir()) == ["int8.sjx", "m.onnx", "m.sjx"]
    return made


@pytest.fixture(scope="module")
def heard(files) -> acoustic.BundleAcoustic:
    return acoustic.open_acoustic(files["workdir"])


def ragged(rows, size, lengths, seed=0):
    """(int16 [B, S] with noise past the end of each row too, int32 [B])."""
    samples = np.random.default_rng(seed).normal(0, 3000, (rows, size)).astype(np.int16)
    return samples, np.asarray(lengths, np.int32)


BATCHES = [ragged(3, 16_000, [16_000, 9_001, 0]), ragged(1, 5_555, [5_555]), ragged(1, 7, [7])]


def assert_close(found, wanted):
    np.testing.assert_array_equal(found[1], wanted[1])
    assert found[0].shape == wanted[0].shape
    for row, frames in enumerate(wanted[1]):
        np.testing.assert_allclose(found[0][row, :frames], wanted[0][row, :frames], atol=CLOSE)


# ---- The same logits ---------------------------------------------------------------------------

ALONE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
class Allowed:  # nothing is there but the standard library, jax and numpy with what they need
    def find_spec(self, name, path=None, target=None):
        known = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "sjx"}
        known |= sys.stdlib_module_names
        if name.partition(".")[0] in known or name.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Allowed()]
sys.path.insert(0, ".")
import numpy as np
import sjx
model = sjx.load("m.sjx")
given = np.load("given.npz")
found = {}
for key in sorted({name[1:] for name in given}):
    found["l" + key], found["f" + key] = model.logits(given["s" + key], given["n" + key])
np.savez("found.npz", **found)
assert "flax" not in sys.modules and "speech_jax" not in sys.modules
sys.exit(sjx.main(["m.sjx", "said.wav", "absent.wav"]))
"""


def test_jax_and_numpy_alone_give_the_same_logits_and_text(files, heard, finished, tones, tmp_path):
    shutil.copy(sjx.__file__, tmp_path / "sjx.py")
    shutil.copy(files["m.sjx"], tmp_path)
    batches = BATCHES[:2]
    given = {f"s{i}": samples for i, (samples, _) in enumerate(batches)}
    given |= {f"n{i}": lengths for i, (_, lengths) in enumerate(batches)}
    np.savez(tmp_path / "given.npz", **given)
    said, _ = soundfile.read(tones / "dev" / "1" / "1" / "1-1-0000.flac", dtype="int16")
    with wave.open(str(tmp_path / "said.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(said.tobytes())
    (tmp_path / "alone.py").write_text(ALONE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "alone.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.startswith("error: absent.wav"), done.stderr[-2000:]
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    lines = map(json.loads, finished.workdir.predictions("dev").read_text().splitlines())
    text = next(line["hypothesis"] for line in lines if line["id"] == "1-1-0000")
    assert done.stdout == f"said.wav: {text}\n"
    found = np.load(tmp_path / "found.npz")
    for i, batch in enumerate(batches):
        assert_close((found[f"l{i}"], found[f"f{i}"]), heard.logits(*batch))


@pytest.mark.parametrize("kind", ["m.sjx", "m.onnx"])
def test_a_file_is_an_acoustic_model(kind, files, heard):
    opened = acoustic.open_acoustic(files[kind])
    for name in ("sample_rate", "frame_seconds", "longest_seconds"):
        assert getattr(opened, name) == getattr(heard, name)
    assert opened.transcript == heard.transcript
    for batch in BATCHES[:2]:
        assert_close(opened.logits(*batch), heard.logits(*batch))
    logits, frames = opened.logits(*BATCHES[2])  # less than a window
    assert frames == [0]
    assert np.isfinite(logits).all()


def random_acoustic(name):
    """An encoder of tests/test_encoders.py as the model of an Acoustic, its parameters random."""
    kind, variant, settings = CASES[name]
    encoder = models.make_encoder(**models.settings(kind, variant, **settings))
    log_mel = {"sample_rate": 16_000, "mels": 20, "window_ms": 25.0, "hop_ms": 10.0}
    task = Recognize(encoder, FrontEnd(encoder.listens, log_mel), {"labels": 5}, decoder=None)
    shapes = {"audio": ((1, 4_000), np.int16), "audio_length": ((1,), np.int32)}
    batch = {key: jax.ShapeDtypeStruct(*each) for key, each in shapes.items()}
    rng = np.random.default_rng(0)
    params, state = jax.tree.map(
        lambda x: (0.3 * rng.standard_normal(x.shape)).astype(x.dtype),
        jax.eval_shape(task.init, jax.random.key(0), batch),
    )
    state = jax.tree.map(np.abs, state)  # variances

    def function(params, state, samples, lengths):
        batch = {"audio": samples, "audio_length": lengths}
        return task.logits(params, state, batch)[:2]

    frames = lambda samples: encoder.output_lengths(task.frontend.lengths(samples))
    bundle = types.SimpleNamespace(params=params, state=state)
    return types.SimpleNamespace(function=function, frames=frames, bundle=bundle)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"conformer", "wav2vec2-conformer"}))
def test_every_encoder_is_exported_both_ways(name, files):
    """onnxruntime shares no code with XLA: what both give is what the model says."""
    heard = random_acoustic(name)
    arrays, restore = export.stored(heard.bundle.params, heard.bundle.state, "float32")
    program = export.program(heard, restore, list(arrays.values()))
    card = sjx.load(files["m.sjx"]).card
    card |= {"labels": [""] * 5, "shortest": export.shortest(heard)}
    session = onnx.Session(onnx.make(heard, card, *export.batch(heard), {}), "a file")
    assert program.platforms == export.PLATFORMS
    samples, lengths = ragged(3, 9_000, [9_000, 4_321, 0])
    wanted = jax.device_get(jax.jit(program.call)(list(arrays.values()), samples, lengths))
    assert np.abs(wanted[0]).max() > 0.1
    assert_close(session.logits(samples, lengths), wanted)
    # Neither padding nor neighbours change a row, in a graph of any size.
    logits, frames = session.logits(samples[1:2, :5_000], lengths[1:2])
    assert_close((logits, frames), (wanted[0][1:2, : logits.shape[1]], wanted[1][1:2]))


SAME = ("workdir", "m.sjx", "m.onnx")


def test_every_kind_of_file_says_the_same(files, tones):
    recording = max((tones / "dev").rglob("*.flac"), key=lambda path: path.stat().st_size)
    said = {name: speech_jax.load(files[name]).transcribe(recording) for name in SAME}
    assert len(said["workdir"].text.split()) > 2
    for name in ("m.sjx", "m.onnx"):
        assert said[name].text == said["workdir"].text
        assert [w[:3] for w in said[name].words] == [w[:3] for w in said["workdir"].words]


def test_a_language_model_travels_in_the_file(heard, tmp_path):
    path = tmp_path / "my.arpa"
    path.write_text("what a language model is")
    config = heard.bundle.config.copy_and_resolve_references()
    with config.unlocked():
        config.decoder.update({"name": "beam", "lm": str(path), "lm_weight": 0.7})
    beam = acoustic.BundleAcoustic(dataclasses.replace(heard.bundle, config=config))
    export.write_sjx(beam, tmp_path / "m.sjx", {})
    card, kept = export.make_card(beam, {}), export.kept_files(config)
    (tmp_path / "m.onnx").write_bytes(onnx.make(beam, card, *export.batch(beam), kept))
    path.unlink()
    for name in ("m.sjx", "m.onnx"):
        decoder = acoustic.open_acoustic(tmp_path / name).decoder
        assert (decoder["name"], decoder["lm_weight"]) == ("beam", 0.7)
        assert pathlib.Path(decoder["lm"]).name.endswith("my.arpa")
    with pytest.raises(export.ExportError, match=r"my\.arpa cannot be read"):
        export.write_sjx(beam, tmp_path / "again.sjx", {})


# ---- Weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CASES))
def test_what_is_kept_of_weights(name):
    params = random_acoustic(name).bundle.params
    whole, _ = export.stored(params, {}, "float32")
    short, restore = export.stored(params, {}, "int8")
    half, _ = export.stored(params, {}, "bfloat16")
    kinds = {path: str(array.dtype) for path, array in short.items()}
    matrices = {path for path, kind in kinds.items() if kind == "int8"}
    assert matrices == {path for path, array in half.items() if array.dtype == jnp.bfloat16}
    assert any(path.endswith("head/kernel") for path in matrices)
    assert {path for path in whole if path.endswith(("/recurrent", "/gate", "/input"))} <= matrices
    again = export.stored(*jax.device_get(restore(list(short.values()))), "float32")[0]
    for path, array in whole.items():
        if path not in matrices:
            np.testing.assert_array_equal(again[path], array)
            assert not path.endswith("qkv/kernel")
            continue
        scale = short[f"{path}.scale"]
        assert np.abs(short[path]).max() == 127
        assert scale.size * 8 <= array.size
        assert (np.abs(again[path] - array) <= scale * 0.5001).all()
        # One number for each output: the largest of its inputs is exact, but for rounding.
        reduced = [axis for axis, size in enumerate(scale.shape) if size < array.shape[axis]]
        largest = [np.abs(x).max(tuple(reduced)) for x in (again[path], array)]
        np.testing.assert_allclose(*largest, rtol=1e-6)


def test_int8_is_near_and_small(files, heard):
    opened = acoustic.open_acoustic(files["int8.sjx"])
    wanted, found = heard.logits(*BATCHES[0]), opened.logits(*BATCHES[0])
    difference = np.abs(found[0][0] - wanted[0][0]).max() / np.abs(wanted[0]).max()
    assert 1e-6 < difference < 0.1
    kept = [sum(a.nbytes for a in export.stored(heard.bundle.params, {}, w)[0].values())
            for w in export.WEIGHTS]  # fmt: skip
    assert kept[0] > 1.7 * kept[1] > 3 * kept[2] / 2


# ---- The card ----------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is(files, finished):
    with zipfile.ZipFile(files["m.sjx"]) as archive:
        card = json.loads(archive.read("model.json"))
    assert card == sjx.load(files["m.sjx"]).card
    assert card["model"]["scores"]["dev"]["wer"] == finished.results["splits"]["dev"]["wer"]
    assert card["model"]["config"]["model"]["width"] == 16
    assert "tokenizer.json" in card["parts"]
    assert card["sample_rate"] == 16_000
    lines = "\n".join(sjx.summary(card))
    for part in ("recognize", "16000 Hz", "cpu, cuda, tpu", "dev: wer"):
        assert part in lines
    assert onnx.load(files["m.onnx"]).card["model"] == card["model"]


def test_the_same_model_gives_the_same_bytes_which_name_no_file_of_ours(files, heard, tmp_path):
    export.write_sjx(heard, tmp_path / "again.sjx", export._scores(files["workdir"]))
    assert (tmp_path / "again.sjx").read_bytes() == files["m.sjx"].read_bytes()
    with zipfile.ZipFile(files["m.sjx"]) as archive:
        assert b".py" not in archive.read("program")


# ---- What is wrong is one line -----------------------------------------------------------------


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def rewritten(data: bytes, member: str, edit) -> bytes:
    """The archive with another content of a member, its checksum of zip renewed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(zipfile.ZipInfo(name), edit(content) if name == member else content)
    return out.getvalue()


def other_card(data: bytes, **values) -> bytes:
    """The archive with other values in its card, sealed anew."""

    def edit(content):
        card = json.loads(content) | values
        return json.dumps(card | {"sha256": sjx.digest(card)})

    return rewritten(data, "model.json", edit)


def packed(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.json", "{" + " " * 100_000_000)
    return out.getvalue()


HEAD = "parameters/params/head/kernel"
DAMAGED = {
    "m.sjx": {
        "nothing": (lambda data: b"", "not an .sjx file"),
        "no archive": (lambda data: b"hello" * 1_000, "not an .sjx file"),
        "half": (lambda data: data[: len(data) // 2], "not an .sjx file"),
        "a byte less": (lambda data: data[:-1], "not an .sjx file"),
        "a byte": (lambda data: flipped(data, data.index(b"StableHLO") + 500), "at program"),
        "a parameter": (
            lambda data: rewritten(data, HEAD, lambda content: flipped(content, 30)),
            f"{HEAD} has changed since",
        ),
        "the program": (
            lambda data: rewritten(data, "program", lambda content: content[:-1]),
            "program has changed since",
        ),
        "the card": (
            lambda data: rewritten(
                data, "model.json", lambda card: card.replace(b"16000", b"8000")
            ),
            "its card has changed since",
        ),
        "no card": (lambda data: data.replace(b"model.json", b"no___.json"), "holds no model.json"),
        "no JSON": (
            lambda data: rewritten(data, "model.json", lambda _: b"[" * 9999),
            "a damaged card",
        ),
        "newer": (lambda data: other_card(data, version=99), "of version 99"),
        "no version": (lambda data: other_card(data, version=None), "of version None"),
        "other shapes": (lambda data: other_card(data, arguments=[]), "cannot be used"),
        "no program": (lambda data: other_card(data, program={}), "cannot be used"),
        "no rate": (lambda data: other_card(data, sample_rate="fast"), "has no sample_rate"),
        "no sums": (lambda data: other_card(data, members={}), "cannot be used"),
        "packed": (packed, "is packed"),
    },
    "m.onnx": {
        "nothing": (lambda data: b"", "not an ONNX file"),
        "no graph": (lambda data: b"hello" * 1_000, "not an ONNX file"),
        "half": (lambda data: data[: len(data) // 2], "not an ONNX file"),
        "a weight": (lambda data: flipped(data, len(data) // 2), "changed since"),
        "the card": (lambda data: data.replace(b"16000", b"26000"), "changed since"),
        "of others": (
            lambda data: data.replace(b"\nspeech_jax\x12", b"\nspeech_xyz\x12"),
            "not an ONNX file that",
        ),
    },
}


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, cases in DAMAGED.items() for case in cases]
)
def test_damage_is_one_line(kind, case, files, tmp_path):
    damage, said = DAMAGED[kind][case]
    path = tmp_path / kind
    path.write_bytes(damage(files[kind].read_bytes()))
    with pytest.raises(ValueError, match=said) as error:
        acoustic.open_acoustic(path)
    assert isinstance(error.value, export.UserError)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["m.sjx", "m.onnx"])
@pytest.mark.parametrize("case", ["absent", "folder"])
def test_what_is_no_file_is_one_line(kind, case, tmp_path):
    if case == "folder":
        (tmp_path / kind).mkdir()
    with pytest.raises(export.UserError, match="is a folder" if case == "folder" else "not exist"):
        acoustic.open_acoustic(tmp_path / kind)


@pytest.mark.parametrize(
    ("samples", "lengths", "said"),
    [
        (np.zeros((1, 9), np.float32), [9], "give int16"),
        (np.zeros(9, np.int16), [9], "give int16"),
        (np.zeros((0, 9), np.int16), [], "give int16"),
        (np.zeros((1, 9), np.int16), [9, 9], "a whole number for each row"),
        (np.zeros((1, 9), np.int16), [0.5], "a whole number for each row"),
        (np.zeros((1, 9), np.int16), [10], "must lie in"),
        (np.zeros((1, 9), np.int16), [-1], "must lie in"),
    ],
)
def test_arrays_that_cannot_be_are_one_line(samples, lengths, said, files):
    with pytest.raises(sjx.SjxError, match=said):
        sjx.load(files["m.sjx"]).logits(samples, np.asarray(lengths))


@pytest.mark.parametrize(
    ("out", "flags", "said"),
    [
        ("folder.sjx", [], "is a folder"),
        ("text.sjx", [], "did not write it"),
        ("text.sjx/model.sjx", [], "cannot be read"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(out, flags, said, files, tmp_path, capsys):
    (tmp_path / "folder.sjx").mkdir()
    (tmp_path / "text.sjx").write_text("my notes")
    assert export.main([str(files["workdir"]), str(tmp_path / out), *flags]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert (tmp_path / "text.sjx").read_text() == "my notes"


@pytest.mark.parametrize(
    ("out", "flags", "said"),
    [
        ("model.zip", [], "end it in .sjx or .onnx"),
        ("model", [], "end it in .sjx or .onnx"),
        ("model.sjx", ["--format=onnx"], "--format=onnx is another: leave one out"),
        ("model.onnx", ["--weights=int8"], "--weights is for .sjx files"),
        ("model", ["--format=onnx", "--weights=int8"], "--weights is for .sjx files"),
        ("model.sjx", ["--weights=int4"], "--weights"),
    ],
)
def test_a_wrong_command_line_is_of_status_2(out, flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        export.main(["nowhere", str(tmp_path / out), *flags])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_the_format_ends_a_name_that_does_not_say_it():
    assert export._named("a/mine.v2", "onnx") == ("a/mine.v2.onnx", "onnx")
    assert export._named("mine.ONNX", "onnx") == ("mine.ONNX", "onnx")
    assert export._named("mine.sjx", None) == ("mine.sjx", "sjx")


def test_a_bucket_is_one_line():
    with pytest.raises(export.ExportError, match="in a bucket"):
        export.check_place(epath.Path("gs://bucket/model.sjx"))


def test_a_full_disk_is_one_line_and_leaves_the_old_file(files, tmp_path, capsys, monkeypatch):
    out = shutil.copy(files["m.sjx"], tmp_path / "m.sjx")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    assert export.main([str(files["workdir"]), str(out)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: cannot write {out} (")
    assert "No space" in error
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [files["m.sjx"].read_bytes()]


def test_a_graph_that_differs_is_refused(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(onnx_primitives._SAME, "logistic", "HardSigmoid")
    assert export.main([str(files["workdir"]), str(tmp_path / "m.onnx")]) == 1
    assert "other logits than the model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_onnx_has_not_is_refused_by_name():
    traced = jax.jit(lambda x: jnp.sort(x)).trace(np.zeros(3, np.float32))
    with pytest.raises(onnx_primitives.GraphError, match="'sort'"):
        onnx_graph.Graph({}).trace(traced.jaxpr, [onnx_primitives.Tensor("x")])


@pytest.mark.parametrize("lacks", ["onnx", "onnxruntime"])
def test_without_the_extra_it_is_one_line(lacks, files, heard, monkeypatch):
    whole = builtins.__import__

    def lacking(name, *arguments, **settings):
        if name.partition(".")[0] == lacks:
            raise ImportError(f"no {lacks}")
        return whole(name, *arguments, **settings)

    monkeypatch.setattr(builtins, "__import__", lacking)
    uses = {
        "onnx": lambda: onnx.make(heard, {}, *export.batch(heard), {}),
        "onnxruntime": lambda: onnx.load(files["m.onnx"]),
    }
    with pytest.raises(onnx.OnnxError, match=r"pip install 'speech_jax\[onnx\]'"):
        uses[lacks]()


def test_a_model_of_no_text_is_refused(monkeypatch, tmp_path, heard, capsys):
    config = heard.bundle.config.copy_and_resolve_references()
    with config.unlocked():
        config.task = tasks.settings("best_rq")
    parts = {"audio": heard.bundle.parts["audio"]}
    model = dataclasses.replace(heard.bundle, config=config, parts=parts)
    monkeypatch.setattr(bundle, "open", lambda folder: model)
    assert export.main(["somewhere", str(tmp_path / "m.sjx")]) == 1
    assert "best_rq" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
