"""MLIR that several `plgpu.inline_mgpu` bodies emit."""

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm


def const(value: int, bits: int = 32) -> ir.Value:
    """An integer constant of `bits` bits."""
    return arith.constant(ir.IntegerType.get_signless(bits), value)


def byte_offset(pointer: ir.Value, offset: ir.Value) -> ir.Value:
    """The pointer `offset` bytes behind `pointer`."""
    return utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8))


def global_pointer(ref: ir.Value) -> ir.Value:
    """The start of an array in global memory, as a pointer of that address space."""
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(ref))
