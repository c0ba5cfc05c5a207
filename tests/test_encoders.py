"""What every encoder passes. A new one is a row in CASES."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stepwise
from speech_jax import models, rules
from speech_jax.errors import UserError
from speech_jax.models import deepspeech
from speech_jax.models import stepwise as pieces
from speech_jax.training import sharding

SMALL = {"width": 16, "num_layers": 2, "heads": 2, "kernel": 5, "dropout": 0.1}
WAVEFORM = {
    "width": 16, "num_layers": 2, "heads": 2, "feed_forward": 24, "dropout": 0.1,
    "conv_channels": (8, 8, 12), "conv_kernels": (10, 8, 8), "conv_strides": (5, 8, 8),
    "mask_time": 0.3, "mask_time_length": 4,
}  # fmt: skip
CASES = {
    "conformer": ("conformer", "tiny", {**SMALL, "scan": False}),
    "conformer-scan": ("conformer", "s", {**SMALL, "scan": True, "remat": True}),
    "conformer-relative-batch-8": (
        "conformer",
        "tiny",
        {**SMALL, "position": "relative", "conv_norm": "batch", "subsampling": 8, "adapter": 3},
    ),
    "conformer-separable-8": (
        "conformer",
        "tiny",
        {**SMALL, "subsampling_kind": "separable", "subsampling": 8},
    ),
    "conformer-over-time": (
        "conformer",
        "tiny",
        {**SMALL, "subsampling_kind": "time", "layer_drop": 0.2},
    ),
    "wav2vec2": (
        "wav2vec2",
        "tiny",
        WAVEFORM | {"position_kernel": 8, "position_groups": 4, "adapter": 3},
    ),
    "deepspeech": ("deepspeech", "tiny", {"width": 16, "num_layers": 2}),
    "deepspeech-lookahead-batch": (
        "deepspeech",
        "tiny",
        {
            "width": 16,
            "num_layers": 2,
            "cell": "gru",
            "bidirectional": False,
            "lookahead": 3,
            "adapter": 3,
            "norm": "batch",
            "subsampling": 2,
        },
    ),
    "deepspeech-original": (
        "deepspeech",
        "original",
        {"width": 16, "context": 2, "subsampling": 1},
    ),
    "wavenet": ("wavenet", "tiny", {"width": 16, "num_layers": 6, "cycle": 3}),
    "wavenet-causal-8": (
        "wavenet",
        "tiny",
        {"width": 16, "num_layers": 4, "kernel": 2, "causal": True, "subsampling": 8, "adapter": 3},
    ),
    "wavenet-waveform": (
        "wavenet_waveform",
        "tiny",
        {"width": 16, "num_layers": 4, "cycle": 2, "dropout": 0.1, "remat": True},
    ),
    "wav2vec2-conformer": ("wav2vec2_conformer", "tiny", WAVEFORM | {"kernel": 5}),
    "wav2vec2-conformer-rotary-scan": (
        "wav2vec2_conformer",
        "tiny",
        WAVEFORM
        | {"kernel": 5, "attention": "rotary_input", "scan": True, "remat": True, "adapter": 3},
    ),
}


class Case:
    """An encoder with random (not zero) parameters, compiled for one shape."""

    def __init__(self, name, variant, settings):
        self.encoder = models.make_encoder(**models.settings(name, variant, **settings))
        rng = np.random.default_rng(0)
        # Frames of 40 log-mel bands, or samples.
        waveform = self.encoder.listens == "waveform"
        self.size, self.known = (6_400, [6_100, 3_700, 0]) if waveform else (64, [61, 37, 0])
        self.lengths = jnp.array(self.known)
        shape = (3, self.size) if waveform else (3, self.size, 40)
        self.inputs = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        init = jax.jit(self.encoder.init, static_argnums=3)
        variables = init(jax.random.key(0), self.inputs, self.lengths, True)
        self.params = jax.tree.map(
            lambda p: np.asarray(p) + 0.1 * rng.standard_normal(p.shape).astype(p.dtype),
            variables.pop("params"),
        )
        self.state = variables

        def apply(params, inputs, lengths):
            return self.encoder.apply({"params": params, **self.state}, inputs, lengths, True)

        def train_loss(params, key):
            hidden, _ = self.encoder.apply(
                {"params": params, **self.state},
                self.inputs,
                self.lengths,
                False,
                rngs={"dropout": key},
                mutable=list(self.state),
            )[0]
            return jnp.square(hidden.astype(jnp.float32)).sum()

        self.apply = jax.jit(apply)
        self.gradient = jax.jit(jax.grad(train_loss))


@functools.cache
def make_case(name):
    return Case(*CASES[name])


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return make_case(request.param)


@pytest.fixture(params=[name for name in CASES if name.startswith("wav2vec2")], ids=str)
def listener(request):
    """An encoder of waveforms, which masks its own frames."""
    return make_case(request.param)


def test_output_lengths_are_what_comes_out(case):
    hidden, lengths = case.apply(case.params, case.inputs, case.lengths)
    expected = [int(case.encoder.output_lengths(length)) for length in case.known]
    assert lengths.tolist() == expected
    assert hidden.shape[1] == int(case.encoder.output_lengths(case.size))
    assert np.isfinite(hidden).all()
    for row, length in enumerate(expected):
        assert not np.any(hidden[row, length:])
        assert not length or np.abs(hidden[row, :length]).max() > 0


def test_all_layers_come_where_they_are_asked_for(case):
    """The last one is what comes without, each one another, and 0 past the end."""
    apply = functools.partial(case.encoder.apply, {"params": case.params, **case.state})
    every, lengths = jax.jit(lambda: apply(case.inputs, case.lengths, True, layers_too=True))()
    hidden, _ = case.apply(case.params, case.inputs, case.lengths)
    assert every.shape == (*hidden.shape[:2], case.encoder.num_layers + 1, hidden.shape[2])
    np.testing.assert_allclose(every[:, :, -1], hidden, atol=1e-5)
    assert not np.any(np.asarray(every[0, int(lengths[0]) :]))
    changes = [np.abs(every[0, :, i + 1] - every[0, :, i]).max() for i in range(every.shape[2] - 1)]
    assert min(changes) > 1e-3


def test_padding_and_neighbours_change_nothing(case):
    hidden, lengths = case.apply(case.params, case.inputs, case.lengths)
    garbage = jnp.arange(case.size)[None, :] >= case.lengths[:, None]
    dirty = jnp.where(garbage.reshape(3, -1, *[1] * (case.inputs.ndim - 2)), 1e3, case.inputs)
    np.testing.assert_allclose(case.apply(case.params, dirty, case.lengths)[0], hidden, atol=1e-5)
    others = case.inputs.at[1:].set(jnp.flip(case.inputs[1:], axis=1))
    longer = jnp.array([case.known[0], case.size * 25 // 32, case.size])
    changed = case.apply(case.params, others, longer)[0]
    count = int(lengths[0])
    np.testing.assert_allclose(changed[0, :count], hidden[0, :count], atol=1e-5)
    alone = case.apply(case.params, case.inputs[1:2, : case.known[1]], case.lengths[1:2])[0]
    np.testing.assert_allclose(alone[0], hidden[1, : int(lengths[1])], atol=2e-4)


def test_every_parameter_learns(case):
    gradient = case.gradient(case.params, jax.random.key(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        name = jax.tree_util.keystr(path)
        # A constant added to every key moves no softmax.
        if "'qk" not in name:
            assert np.abs(leaf).max() > 0, path


def test_one_rule_of_sharding_is_of_each_parameter(case):
    for name in rules.names(case.params):
        axes = rules.only(case.encoder.rules, name, "sharding")
        assert set(axes) <= {"fsdp", "tensor", None}


def test_what_the_contract_names_is_there(case):
    hidden, _ = case.apply(case.params, case.inputs, case.lengths)
    assert hidden.shape[2] == case.encoder.width
    assert case.encoder.listens in ("log_mel", "waveform")
    assert "tiny" in case.encoder.VARIANTS
    # Lengths on the host stay there: the batch plan asks for all of a corpus.
    known = case.encoder.output_lengths(np.asarray(case.known))
    assert isinstance(known, np.ndarray)
    assert known.tolist() == [int(case.encoder.output_lengths(length)) for length in case.known]


def test_geometry_is_what_a_frame_sees(listener):
    """A change at either end of a window changes its frame, before the layers mix frames."""
    window, hop = listener.encoder.geometry()
    extract = jax.jit(
        lambda inputs: listener.encoder.apply(
            {"params": listener.params}, inputs, listener.lengths, method="extract"
        )[0]
    )
    before, frame = extract(listener.inputs), 3
    for offset, seen in ((-1, False), (0, True), (window - 1, True), (window, False)):
        # The group norm lets the whole utterance through, at a few parts in a thousand.
        changed = extract(listener.inputs.at[0, frame * hop + offset].add(30.0))
        assert (np.abs(changed - before)[0, frame].max() > 1.0) == seen


def test_a_mask_hides_frames(listener):
    mask = jnp.ones((3, listener.encoder.output_lengths(listener.size)), bool)
    variables = {"params": listener.params, **listener.state}
    run = jax.jit(
        lambda inputs: listener.encoder.apply(variables, inputs, listener.lengths, True, mask=mask)[
            0
        ]
    )
    np.testing.assert_array_equal(run(listener.inputs), run(2 * listener.inputs))


def test_dropout_is_by_key(case):
    first, again, other = (
        jax.tree.leaves(case.gradient(case.params, jax.random.key(seed)))[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


DEEP = SMALL | {"scan": True, "num_layers": 20}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("conformer", DEEP),
        ("conformer", DEEP | {"subsampling_kind": "separable"}),
        ("conformer", DEEP | {"subsampling_kind": "time", "subsampling": 8}),
        ("deepspeech", {"width": 16, "num_layers": 5}),
        ("wavenet", {"width": 16, "num_layers": 5}),
    ],
)
def test_hidden_frames_do_not_blow_gradients_up(name, settings):
    """SpecAugment makes frames of zeros; a norm of nothing has a gradient of one over epsilon."""
    encoder = models.make_encoder(**models.settings(name, "tiny", **settings))
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 40)), jnp.float32)
    inputs, lengths = inputs.at[:, 16:48].set(0.0), jnp.array([64])
    params = jax.jit(encoder.init, static_argnums=3)(jax.random.key(0), inputs, lengths, True)

    def loss(params):
        hidden, _ = encoder.apply(params, inputs, lengths, True)
        return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) < 1e4


def test_scan_and_remat_change_nothing():
    plain = Case("conformer", "tiny", {**SMALL, "scan": False, "dropout": 0.0})
    scanned = Case("conformer", "tiny", {**SMALL, "scan": True, "remat": True, "dropout": 0.0})
    layers = [plain.params[f"layer_{i}"] for i in range(SMALL["num_layers"])]
    stacked = {
        "subsampling": plain.params["subsampling"],
        "layers": jax.tree.map(lambda *p: np.stack(p), *layers),
    }
    ours = plain.apply(plain.params, plain.inputs, plain.lengths)[0]
    np.testing.assert_allclose(
        scanned.apply(stacked, plain.inputs, plain.lengths)[0], ours, atol=1e-5
    )
    key = jax.random.key(0)
    by_scan = scanned.gradient(stacked, key)["layers"]
    for i in range(SMALL["num_layers"]):
        one = plain.gradient(plain.params, key)[f"layer_{i}"]
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-3),
            by_scan,
            one,
        )


@pytest.mark.parametrize("scan", [False, True])
def test_a_layer_is_skipped_for_some_utterances_and_the_same_for_the_others(scan):
    settings = {**SMALL, "num_layers": 1, "dropout": 0.0, "layer_drop": 0.4, "scan": scan}
    encoder = models.make_encoder(**models.settings("conformer", "tiny", **settings))
    inputs = jnp.asarray(np.random.default_rng(0).standard_normal((400, 8, 40)), jnp.float32)
    inputs, lengths = jnp.broadcast_to(inputs[:1], inputs.shape), jnp.full(400, 8)
    params = jax.jit(encoder.init, static_argnums=3)(jax.random.key(0), inputs, lengths, True)
    run = lambda train: encoder.apply(
        params, inputs, lengths, not train, True, rngs={"dropout": jax.random.key(1)}
    )[0]
    whole, dropped = jax.jit(run, static_argnums=0)(False), jax.jit(run, static_argnums=0)(True)
    skipped = jnp.abs(dropped[:, :, 1] - dropped[:, :, 0]).max((1, 2)) == 0
    assert 0.3 < skipped.mean() < 0.5
    np.testing.assert_allclose(dropped[~skipped], whole[~skipped], atol=1e-5)


def test_layers_are_dropped_more_often_towards_the_end():
    encoder = models.make_encoder(**models.settings("conformer", "tiny", layer_drop=0.4))
    found = nn.apply(lambda module: module._skips(4_000), encoder)(
        {}, rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_allclose(found.mean((1, 2, 3)), [0.1, 0.2, 0.3, 0.4], atol=0.03)


@pytest.mark.parametrize(
    "name", ["deepspeech", "deepspeech-lookahead-batch", "wavenet", "wavenet-waveform"]
)
def test_remat_changes_nothing(name, monkeypatch):
    monkeypatch.setattr(deepspeech, "CHUNK", 7)  # several, the last of which is not whole
    kind, variant, settings = CASES[name]
    case, key = make_case(name), jax.random.key(1)
    again = Case(kind, variant, {**settings, "remat": not settings.get("remat", False)})
    found, expected = (jax.tree.leaves(each.gradient(case.params, key)) for each in (again, case))
    largest = max(np.abs(leaf).max() for leaf in expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["deepspeech", "wavenet"])
def test_on_a_mesh_it_is_the_same(name):
    case = make_case(name)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    rng = np.random.default_rng(1)
    batch = {
        "inputs": rng.standard_normal((8, 32, 40)).astype(np.float32),
        "lengths": np.array([32, 30, 17, 0, 32, 8, 25, 31], np.int32),
    }

    def loss(params, batch):
        hidden, _ = case.encoder.apply({"params": params}, batch["inputs"], batch["lengths"], True)
        return (hidden * jnp.cos(jnp.arange(hidden.size)).reshape(hidden.shape)).sum()

    gradient = jax.value_and_grad(loss)
    expected = jax.tree.leaves(jax.jit(gradient)(case.params, batch))
    placed = sharding.shard_params(case.params, mesh, case.encoder.rules)
    assert not all(where.is_fully_replicated for where in jax.tree.leaves(placed))
    with jax.set_mesh(mesh):
        given = jax.device_put(case.params, placed), sharding.put_batch(batch, mesh)
        found = jax.tree.leaves(jax.jit(gradient)(*given))
    largest = max(np.abs(leaf).max() for leaf in expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["conformer", "deepspeech", "wavenet"])
def test_bfloat16_computes_in_it_and_stays_close(name):
    kind, variant, settings = CASES[name]
    exact = make_case(name)
    coarse = models.make_encoder(**models.settings(kind, variant, **settings, dtype="bfloat16"))
    apply = jax.jit(coarse.apply, static_argnums=3)
    hidden, _ = apply({"params": exact.params}, exact.inputs, exact.lengths, True)
    assert hidden.dtype == jnp.bfloat16
    expected = exact.apply(exact.params, exact.inputs, exact.lengths)[0]
    assert np.abs(hidden.astype(jnp.float32) - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize("name", ["deepspeech-lookahead-batch", "wavenet-causal-8"])
def test_no_frame_hears_more_of_the_future_than_it_says(name):
    """By the gradient of a frame: of what comes later than its delay there is none."""
    case, frame = make_case(name), 2
    delay, each = getattr(case.encoder, "delay", 0), case.encoder.subsampling

    def output(inputs):
        hidden = case.apply(case.params, inputs, case.lengths)[0]
        return hidden[0, frame] @ jnp.cos(jnp.arange(hidden.shape[2], dtype=hidden.dtype))

    heard = np.abs(jax.grad(output)(case.inputs)[0]).max(axis=-1) > 0
    known = (frame + delay + 1) * each  # frames of log-mel that there must be
    assert heard[known - each : known].any()
    assert not heard[known:].any()
    assert heard[: each * frame].all()


STREAMS = {
    "lookahead": {
        "name": "deepspeech", "cell": "gru", "lookahead": 3, "norm": "batch",
        "conv_kernels": (6, 5), "adapter": 3,
    },
    "odd lags": {
        "name": "deepspeech", "subsampling": 2, "conv_channels": (4, 4, 4),
        "conv_kernels": (8, 3, 2), "conv_bands": (3, 3, 3),
    },
    "original": {
        "name": "deepspeech", "conv_channels": (), "conv_kernels": (), "conv_bands": (),
        "context": 4, "subsampling": 2, "cell": "simple", "residual": False, "dense_before": 1,
        "dense_after": 1,
    },
    "wavenet": {"name": "wavenet", "kernel": 3, "cycle": 2, "remat": True},
}  # fmt: skip


@pytest.mark.parametrize("settings", STREAMS.values(), ids=STREAMS)
def test_pieces_give_what_the_whole_gives(settings):
    small = {"width": 12, "num_layers": 2} | {
        "deepspeech": {"conv_channels": (4, 4), "bidirectional": False},
        "wavenet": {"subsampling_channels": 4, "causal": True},
    }[settings["name"]]
    settings = small | settings
    case = Case(settings.pop("name"), "tiny", settings)
    valid, each = jnp.ones((3, case.size), bool), case.encoder.subsampling
    whole, _ = case.apply(case.params, case.inputs, jnp.full(3, case.size))
    stepwise.check(
        case.encoder, case.params, (case.inputs, valid), whole,
        state=case.state, reads=(40,), sizes=(each, 6 * each),
    )  # fmt: skip
    # Rows that end in the middle of a piece, with noise behind them.
    valid = jnp.arange(case.size)[None, :] < case.lengths[:, None]
    variables = {"params": case.params, **case.state}
    outputs = jax.jit(
        lambda inputs: pieces.run(
            case.encoder, variables, case.encoder.start(3, 40), (inputs, valid), 6 * each
        )
    )(case.inputs)
    whole, _ = case.apply(case.params, case.inputs, case.lengths)
    np.testing.assert_allclose(outputs, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "cure"), [("deepspeech", "bidirectional=False"), ("wavenet", "causal=True")]
)
def test_what_hears_the_future_has_no_pieces(name, cure):
    with pytest.raises(UserError, match=cure):
        make_case(name).encoder.start(1, 40)


def test_a_piece_is_of_whole_hidden_frames():
    case = make_case("deepspeech-lookahead-batch")
    piece = jnp.zeros((1, 3, 40)), jnp.ones((1, 3), bool)
    with pytest.raises(UserError, match="3 log-mel frames is no multiple of subsampling=2"):
        case.encoder.apply(
            {"params": case.params, **case.state},
            case.encoder.start(1, 40), piece, method="advance",
        )  # fmt: skip


def test_published_sizes():
    """Parameters of the paper's S, M and L (10.3, 30.7, 118.8 M with its transducer head)."""
    for size, millions in {"s": (8, 10.5), "m": (25, 31), "l": (105, 119)}.items():
        encoder = models.make_encoder(**models.settings("conformer", size))
        shapes = jax.eval_shape(
            lambda e=encoder: e.init(
                jax.random.key(0), jnp.zeros((1, 64, 80)), jnp.array([64]), True
            )
        )
        count = sum(x.size for x in jax.tree.leaves(shapes["params"])) / 1e6
        assert millions[0] < count < millions[1], (size, count)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'conformer'"):
        models.make_encoder("conformr")
    with pytest.raises(ValueError, match="did you mean 'width'"):
        models.make_encoder("conformer", widht=3)
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        models.settings("conformer", "s", num_layer=3)
    with pytest.raises(ValueError, match="known: tiny, s, m, l"):
        models.settings("conformer", "xl")
