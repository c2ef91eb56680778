"""Reading files of torch.save without torch."""

import collections
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_fixtures import UPSTREAM

import ssmcore
from ssmcore.torch_pickle import load_tensors

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
}


def saved(path, value, **options):
    torch.save(value, path / "model.bin", **options)
    return path / "model.bin"


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """Copies an archive; `change(name, data)` gives an entry's new data, or None to drop it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = change(name.partition("/")[2], old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def assert_refused(path, match):
    with pytest.raises(ssmcore.InvalidArgumentError, match=match) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)


def test_trained_checkpoint_is_read_as_torch_reads_it():
    path = UPSTREAM / "pytorch_model.bin"
    expected = torch.load(path, weights_only=True)
    tensors = load_tensors(path)
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].shape == tuple(tensor.shape)
        assert tensors[name].dtype == DTYPES[tensor.dtype]
        np.testing.assert_array_equal(tensors[name].astype(np.float32), tensor.float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path, dtype):
    tensor = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    array = load_tensors(saved(tmp_path, {"t": tensor}))["t"]
    assert array.dtype == DTYPES[dtype]
    np.testing.assert_array_equal(array.astype(np.complex64), tensor.to(torch.complex64).numpy())


def test_views_keep_their_strides_and_offsets(tmp_path):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "transposed": base.permute(2, 0, 1),
        "tail": base[1:, 2:],
        "every other": base[:, ::2, 1::2],
        "scalar": base[2, 3, 4],
        "empty": base[:, :0],
        "none": torch.empty(0),
    }
    arrays = load_tensors(saved(tmp_path, views))
    for name, view in views.items():
        np.testing.assert_array_equal(arrays[name], view.numpy())
        if view.numel() > 1:
            assert arrays[name].strides == view.numpy().strides


def test_tied_tensors_share_memory_and_nothing_is_copied(tmp_path):
    weight = torch.randn(4, 3)
    arrays = load_tensors(saved(tmp_path, {"a": weight, "b": weight, "c": weight[1:]}))
    assert np.shares_memory(arrays["a"], arrays["b"])
    assert np.shares_memory(arrays["a"], arrays["c"])
    assert not arrays["a"].flags.writeable


def test_state_dict_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    expected = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    arrays = load_tensors(saved(tmp_path, module.state_dict()))
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_parameters(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    arrays = load_tensors(saved(tmp_path, collections.OrderedDict(p=parameter)))
    np.testing.assert_array_equal(arrays["p"], parameter.detach().numpy())


class Malicious:
    """Unpickled as usual, it writes a file."""

    def __init__(self, path):
        self._command = f"open({str(path)!r}, 'w').write('ran')"

    def __reduce__(self):
        return exec, (self._command,)


def test_malicious_pickle_is_refused_and_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    path = saved(tmp_path, {"weight": torch.zeros(3), "evil": Malicious(ran)})
    assert_refused(path, r"it names \w+\.exec, which is no part")
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "the file should do its harm where it is trusted"


def test_malicious_pickle_does_not_import(tmp_path):
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    path = saved(tmp_path, {"weight": torch.zeros(1)})
    evil = rewritten(
        path,
        tmp_path / "evil.bin",
        lambda name, data: b"charmful\nattack\n." if name == "data.pkl" else data,
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import ssmcore\nfrom ssmcore.torch_pickle import load_tensors\n"
        f"try: load_tensors({str(evil)!r})\n"
        "except ssmcore.Error as error: print(error)\n"
        "print('harmful' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "names harmful.attack" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"
    assert not (tmp_path / "ran").exists()


def test_pickle_cannot_change_its_stand_ins(tmp_path):
    path = saved(tmp_path, {"weight": torch.zeros(1)})
    set_attribute = b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'__doc__'\nS'changed'\nstb."
    evil = rewritten(
        path,
        tmp_path / "evil.bin",
        lambda name, data: set_attribute if name == "data.pkl" else data,
    )
    assert_refused(evil, "cannot read its pickle")


@pytest.mark.parametrize(
    "value, match",
    [
        ([torch.zeros(2)], "expected a dictionary of tensors, got a list"),
        (torch.zeros(2), "expected a dictionary of tensors, got a ndarray"),
        ({"step": 3, "w": torch.zeros(2)}, "'step' should be a tensor, but is 3"),
        ({"model": {"w": torch.zeros(2)}}, "'model' should be a tensor, but is a dict"),
        ({3: torch.zeros(2)}, "expected names of tensors, got 3"),
        ({"w": torch.zeros(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "ComplexDoubleStorage"),
        ({"w": torch.zeros(1).expand(10**15)}, "does not fit its storage of 1 elements"),
    ],
)
def test_other_values_are_refused(tmp_path, value, match):
    assert_refused(saved(tmp_path, value), match)


def test_legacy_format_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    assert_refused(path, "torch 1.6")


def test_compressed_archive_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.zeros(200)})
    target = tmp_path / "small.bin"
    rewritten(path, target, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert_refused(target, "compressed")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda name, data: None if name == "data/0" else data, "no entry"),
        (lambda name, data: None if name == "data.pkl" else data, r"no data\.pkl"),
        (lambda name, data: data[:-4] if name == "data/0" else data, "should hold 6 elements"),
        (lambda name, data: b"big" if name == "byteorder" else data, "byte order"),
        (lambda name, data: data[:40] if name == "data.pkl" else data, "cannot read its pickle"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, change, match):
    path = saved(tmp_path, {"w": torch.arange(6.0)})
    assert_refused(rewritten(path, tmp_path / "damaged.bin", change), match)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "offset, shape, strides",
    [
        (0, (7,), (1,)),
        (1, (6,), (1,)),
        (0, (2, 3), (4, 1)),
        (7, (0,), (1,)),
        (-1, (2,), (1,)),
        (4, (3,), (-1,)),
        (0, (2, -3), (3, 1)),
        (0, (2, 3), (1,)),
        (0, (2,), (2**62,)),
        (0, (2.0,), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, offset, shape, strides):
    class Forged:
        def __init__(self, storage):
            self.storage = storage

        def __reduce__(self):
            arguments = (self.storage, offset, shape, strides, False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    storage = torch.arange(6.0).storage()
    assert_refused(saved(tmp_path, {"w": Forged(storage)}), "a tensor")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive", pickle.dumps({"w": 1})])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert_refused(path, "not a zip archive")


def test_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "model.bin", "No such file")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_damage_anywhere_is_an_error_or_harmless(tmp_path, data):
    whole = saved(tmp_path, {"a": torch.arange(4.0), "b": torch.ones(2, 3)}).read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))]
    path = tmp_path / "damaged.bin"
    path.write_bytes(damaged)
    try:
        tensors = load_tensors(path)
    except ssmcore.InvalidArgumentError:
        return
    assert all(tensor.nbytes <= len(whole) for tensor in tensors.values())
    assert all(tensor.tobytes() is not None for tensor in tensors.values())
