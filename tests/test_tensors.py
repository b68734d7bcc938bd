"""Between records and torch: dtypes, specs, bytes."""

import pytest
import torch

from funcmodel.errors import PlanError
from funcmodel.records.devices import CPU
from funcmodel.records.dtypes import DTYPES
from funcmodel.records.tensors import TensorSpec
from funcmodel.run.tensors import TORCH_DTYPES, byte_view, empty, tensor_spec, torch_dtype, torch_shape


@pytest.mark.parametrize("kind", [d for d in DTYPES if d.torch], ids=repr)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_dtype_of_torch_has_the_width_that_the_record_says(kind):
    assert torch_dtype(kind).itemsize * 8 == kind.bits * kind.pack
    spec = TensorSpec([3, 4], kind)
    made = empty(spec, CPU)
    assert tensor_spec(made) == spec
    assert made.nbytes == spec.nbytes
    assert len(byte_view(made)) == spec.nbytes


def test_a_dtype_that_torch_lacks_is_refused():
    lacking = [d for d in DTYPES if d not in TORCH_DTYPES]
    assert {d.name for d in lacking} >= {"f6_e2m3", "f6_e3m2"}
    for kind in lacking:
        with pytest.raises(PlanError):
            torch_dtype(kind)


def test_packed_types_fill_whole_bytes_along_the_last_axis():
    assert torch_shape(TensorSpec([3, 4], "F4")) == (3, 2)
    for shape in ([], [4, 3]):
        with pytest.raises(PlanError):
            torch_shape(TensorSpec(shape, "F4"))


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_a_dtype_without_a_name_is_refused():
    with pytest.raises(PlanError):
        tensor_spec(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 1), (1, 3), (2, 3)])
def test_bytes_are_shared_whatever_the_strides_of_axes_of_one(shape):
    tensor = torch.arange(24, dtype=torch.int16)[3 : 3 + max(1, torch.Size(shape).numel())]
    tensor = tensor.as_strided(
        shape, [7 if n < 2 else 1 if i == len(shape) - 1 else shape[-1] for i, n in enumerate(shape)]
    )
    view = byte_view(tensor)
    assert bytes(view) == b"".join(int(x).to_bytes(2, "little") for x in tensor.flatten())
    if tensor.numel():
        view[0] = 255
        assert int(tensor.flatten()[0]) == 255


def test_bytes_out_of_order_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        byte_view(torch.ones(3, 2).T)
