"""Language models on a GPU: beside the CPU, in bfloat16, on arrays anywhere, out of memory."""

import ctypes
import itertools

import numpy as np
import pytest
from model_fixtures import BUNDLED, DATA, PROMPT, bundled_model, golden, golden_text, model_on

import ssmcore
from ssmcore import _core

pytestmark = pytest.mark.cuda
TOLERANCE = 1e-4  # on fp32 logits

MIXED_LENGTHS = [1, 700, 3, 64, 2, 9000, 5]  # one of them is cut by a chunk


@pytest.fixture(autouse=True)
def needs_a_gpu():
    if ssmcore.cuda_device_count() == 0:
        pytest.skip("no CUDA device, or ssmcore was built without CUDA")


@pytest.fixture(params=[False, True], ids=["", "batch-invariant"])
def model(request):
    return model_on("cuda", batch_invariant=request.param)


def random_ids(*shape):
    return np.random.default_rng(0).integers(0, 256, shape)


def test_where_and_in_which_type():
    model = ssmcore.load(device="cuda")
    assert (model.device, model.dtype) == ("cuda:0", "bfloat16")  # as stored
    assert ssmcore.load().device == "cuda:0"
    assert ssmcore.load(device="cuda:0", dtype="fp32").dtype == "float32"
    assert ssmcore.load(device="cpu").dtype == "float32"


def test_logits_are_golden(model):
    expected = golden()["logits_transformers"]
    logits, _ = model.forward(golden()["prompt"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    for split in (1, 3, 40, 73):
        first, state = model.forward(golden()["prompt"][:split])
        second, _ = model.forward(golden()["prompt"][split:], state)
        np.testing.assert_allclose([*first, *second], expected, rtol=0, atol=TOLERANCE)
    state = model.new_state()
    for token_id, row in zip(golden()["prompt"], expected, strict=True):
        np.testing.assert_allclose(model.step([token_id], state)[0], row, rtol=0, atol=TOLERANCE)


def test_continuation_is_golden(model):
    assert model.generate(PROMPT, 256) == golden_text()
    assert "".join(model.stream(PROMPT, 256)) == golden_text()
    assert model.generate([PROMPT] * 3, 256) == [golden_text()] * 3


def test_long_prompts_are_as_on_the_cpu(model):
    ids = random_ids(2, 20_000)  # several chunks
    ours, state = model.forward(ids, logits="last")
    theirs, _ = bundled_model().forward(ids, logits="last")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    assert state.native.device == "cuda:0"


def test_packed_is_as_apart(model):
    ids = random_ids(sum(MIXED_LENGTHS))
    ends = np.cumsum([0, *MIXED_LENGTHS])
    slots = np.random.default_rng(1).permutation(9)[: len(MIXED_LENGTHS)]
    state = model.new_state(9)
    last, _ = model.forward(ids, state, "last", cu_seqlens=ends, state_indices=slots)
    every, _ = model.forward(ids, cu_seqlens=ends)
    for i, (begin, end) in enumerate(itertools.pairwise(ends)):
        alone, own = model.forward(ids[begin:end])
        np.testing.assert_allclose(last[i], alone[-1], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(every[begin:end], alone, rtol=0, atol=TOLERANCE)
        after = model.step([7], state, state_indices=[slots[i]])
        np.testing.assert_allclose(after, model.step([7], own), rtol=0, atol=TOLERANCE)


def test_batch_invariant_to_the_bit():
    model = model_on("cuda", batch_invariant=True)
    ids = random_ids(11, 50)
    together, state = model.forward(ids, logits="last")
    stepped = model.step(ids[:, 0], state)
    for row in range(11):
        alone, own = model.forward(ids[row], logits="last")
        np.testing.assert_array_equal(together[row], alone)
        np.testing.assert_array_equal(stepped[row], model.step(ids[row, :1], own)[0])


def test_graphs_are_as_launches(model):
    def texts(use_graphs):
        state = model.new_state(11)
        decoder = ssmcore.Decoder(model._language_model.new_decoder(state.native, use_graphs))
        decoder.admit(range(11), random_ids(11, 9), temperature=1.0, seed=3)
        tokens = [decoder.take()]
        for count in (11, 11, 11, 3, 3, 3, 1, 1, 1, 11, 11):
            decoder.step(range(count))
            tokens.append(decoder.take())
        return tokens, state.native.save()

    assert texts(True) == texts(False)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 13, 16, 33, 64])
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-4), ("bf16", 0.25), ("fp16", 0.03)])
def test_whole_layers_are_as_their_operators(dtype, tolerance, rows):
    """With slots, a step runs a layer in kernels of its own; without, operator by operator."""
    model = ssmcore.load(device="cuda", dtype=dtype)
    ids = random_ids(rows, 5)
    _, state = model.forward(ids, logits="none")
    elsewhere = model.new_state(rows + 2)
    slots = np.random.default_rng(1).permutation(rows + 2)[:rows]
    model.forward(ids, elsewhere, "none", state_indices=slots)
    before = elsewhere.clone()
    for token_ids in random_ids(3, rows):
        expected = model.step(token_ids, state)
        actual = model.step(token_ids, elsewhere, state_indices=slots)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    unused = [slot for slot in range(rows + 2) if slot not in slots]
    assert all(elsewhere.is_at_start(slot) for slot in unused)
    # States too: those that operators go on from.
    actual = model.forward(ids, elsewhere, "last", state_indices=slots)[0]
    expected = model.forward(ids, state, "last")[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    assert before.native.save() != elsewhere.native.save()


def test_bits_per_byte_in_bfloat16():
    model = ssmcore.load(device="cuda", dtype="bf16")
    full = model_on("cuda")
    for name, expected in (("val_austen.txt", 1.482), ("val_kjv.txt", 1.541)):
        text = (DATA / name).read_text()
        in_float32 = full.score(text, 2048).bits_per_byte
        assert in_float32 == pytest.approx(expected, abs=0.002)
        assert model.score(text, 2048).bits_per_byte == pytest.approx(in_float32, abs=0.002)


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.5), ("fp16", 0.05)])
def test_half_precision_is_near(dtype, tolerance):
    logits, _ = ssmcore.load(device="cuda", dtype=dtype).forward(golden()["prompt"])
    assert 0 < abs(logits - golden()["logits_transformers"]).max() < tolerance


def test_arrays_on_the_gpu_stay_there(model):
    torch = pytest.importorskip("torch")
    ids = random_ids(3, 30)
    expected, state = model.forward(ids)
    on_gpu = torch.tensor(ids, device="cuda")
    logits, own = model.forward(on_gpu)
    assert logits.device.type == "cuda" and logits.dtype == torch.float32
    np.testing.assert_array_equal(logits.cpu().numpy(), expected)
    stepped = model.step(on_gpu[:, 0], own)
    np.testing.assert_array_equal(stepped.cpu().numpy(), model.step(ids[:, 0], state))
    for strange in (on_gpu.T.contiguous().T, on_gpu.int()):
        np.testing.assert_array_equal(model.forward(strange)[0].cpu().numpy(), expected)


def test_states_move_between_slots_files_and_devices(model, tmp_path):
    ids = random_ids(2, 40)
    _, state = model.forward(ids, logits="none")
    assert not state.is_at_start(0)
    state.save(tmp_path / "state")
    clone, loaded, on_cpu = state.clone(), model.new_state(2), bundled_model().new_state(2)
    loaded.load(tmp_path / "state")
    on_cpu.load(tmp_path / "state")  # the same model elsewhere
    expected = model.step([1, 2], state)
    for same in (clone, loaded):
        np.testing.assert_array_equal(model.step([1, 2], same), expected)
    theirs = bundled_model().step([1, 2], on_cpu)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=TOLERANCE)
    state.copy_slot(1, 0)
    rows = model.step([3, 3], state)
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=TOLERANCE)
    state.reset_slot(0)
    assert state.is_at_start(0) and not state.is_at_start(1)


def test_generation_goes_on_from_a_state(model):
    state = model.new_state(2)
    model.generate([PROMPT[:30], PROMPT[:50]], 0, state=state)
    assert model.generate([PROMPT[30:], PROMPT[50:]], 40, state=state) == [golden_text()[:40]] * 2
    rest = [golden_text()[40:80]] * 2
    # The state has read all 40; one of them again would be one too many.
    assert model.generate([golden_text()[40:41]] * 2, 39, state=state) == [r[1:] for r in rest]


def test_stop_and_state(model):
    stop = golden_text().index(",")
    state, other = model.new_state(), model.new_state()
    assert model.generate(PROMPT, 200, stop=",", state=state) == golden_text()[:stop]
    model.generate(PROMPT + golden_text()[: stop + 1], 0, state=other)
    ours, theirs = model.step([65], state), model.step([65], other)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_ids_out_of_range(model):
    torch = pytest.importorskip("torch")
    with pytest.raises(ssmcore.InvalidArgumentError, match="256"):
        model.forward([256])
    with pytest.raises(ssmcore.InvalidArgumentError, match="outside the vocabulary"):
        model.forward(torch.tensor([1, 256], device="cuda"))  # which may not know yet
        ssmcore.synchronize(ssmcore.empty((1,), "float32", "cuda"))
    assert np.isfinite(model.forward([1])[0]).all()


def test_devices_that_are_not_there():
    with pytest.raises(ssmcore.BackendError, match="cuda:77: this machine has"):
        ssmcore.load(device="cuda:77")


def test_progress_of_loading():
    seen = []
    ssmcore.load(device="cuda", progress=lambda done, total: seen.append((done, total)))
    done = [bytes_done for bytes_done, _ in seen]
    assert len(set(done)) == len(done) > 50 and done == sorted(done)
    assert {total for _, total in seen} == {done[-1]}

    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        ssmcore.load(device="cuda", progress=stop)


def in_use():
    free, total = _core.device_memory("cuda")
    return total - free


def test_out_of_memory_says_for_what_and_the_process_goes_on():
    torch = pytest.importorskip("torch")
    model = ssmcore.load(device="cuda")
    free, _ = _core.device_memory("cuda")
    ballast = torch.empty(free - 200 * 2**20, dtype=torch.uint8, device="cuda")
    with pytest.raises(ssmcore.BackendError, match=r"out of memory .* bytes for the states"):
        model.new_state(100_000)
    with pytest.raises(ssmcore.BackendError, match=r"out of memory .* bytes for logits"):
        model.forward(random_ids(400_000))
    assert model.generate(PROMPT, 5) == golden_text()[:5]
    del ballast
    torch.cuda.empty_cache()
    assert model.generate(PROMPT, 60) == golden_text()[:60]


def test_a_model_that_is_dropped_gives_its_memory_back():
    ssmcore.load(device="cuda").generate(PROMPT, 5)
    before = in_use()
    for _ in range(3):
        ssmcore.load(device="cuda").generate(PROMPT, 5)
    assert in_use() <= before


def test_memory_stays_flat_over_joins_and_leaves():
    model, rng = model_on("cuda"), np.random.default_rng(0)
    state = model.new_state(12)
    decoder = model.new_decoder(state)
    running: set[int] = set()

    def run(steps):
        for _ in range(steps):
            joining = [s for s in range(12) if s not in running and rng.random() < 0.3]
            if joining:
                for slot in joining:
                    state.reset_slot(slot)
                prompts = [random_ids(rng.integers(1, 60)) for _ in joining]
                decoder.admit(joining, prompts, temperature=0.8, seed=int(rng.integers(99)))
                decoder.take()
                running.update(joining)
            if running:
                decoder.step(list(running))
                decoder.take()
            running.difference_update([s for s in running if rng.random() < 0.1])

    run(500)
    before = in_use()
    run(10_000)
    assert in_use() <= before + 2**20


def test_through_the_c_interface():
    torch = pytest.importorskip("torch")
    import c_interface as c

    options = c.struct("context_options")
    options.device.type = 2
    context = c.create("context_create", ctypes.byref(options))
    float32 = c.struct("model_options")
    float32.dtype.code, float32.dtype.bits, float32.dtype.lanes = 2, 32, 1
    model = c.create("model_load", context, str(BUNDLED).encode(), ctypes.byref(float32))
    state = c.create("state_create", model, ctypes.c_int64(1), None)
    on_gpu = torch.full((1, 256), float("nan"), device="cuda")
    logits = c.tensor(np.empty((1, 256), np.float32))
    logits.data, logits.device.type = on_gpu.data_ptr(), 2
    prompt = golden()["prompt"][np.newaxis].astype(np.int64)  # of the host
    torch.cuda.synchronize()
    c.call("model_prefill", model, token_ids=prompt, state=state, logits=logits)
    c.check(c.LIBRARY.ssmcore_context_synchronize(context, None))
    expected = golden()["logits_transformers"][-1:]
    np.testing.assert_allclose(on_gpu.cpu().numpy(), expected, rtol=0, atol=TOLERANCE)
    c.LIBRARY.ssmcore_state_free(state)
    c.LIBRARY.ssmcore_model_free(model)
    c.LIBRARY.ssmcore_context_destroy(context)
