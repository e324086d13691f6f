"""The plain data of csrc/cuda/few_channels.h, field by field: its comments say what each of them is."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

Pair, Three = c_int32 * 2, c_float * 3


class Source(Structure):
    _fields_ = [
        ("x", c_void_p), ("scale", c_void_p), ("shift", c_void_p), ("batch", c_int64),
        ("p", Three), ("act", c_int32), ("done", c_int32), ("unused", c_int32),
    ]  # fmt: skip


class Operand(Structure):
    _fields_ = [
        ("x", Source), ("d", Source), ("minus", c_void_p), ("c2", c_void_p), ("g", c_void_p), ("g_batch", c_int64),
        ("incoming", c_int32), ("unused", c_int32),
    ]  # fmt: skip


class Epilogue(Structure):
    _fields_ = [
        ("d", Source), ("scale", c_void_p), ("shift", c_void_p), ("minus", c_void_p), ("out", c_void_p),
        ("source", c_void_p), ("squares", c_void_p), ("sums", c_void_p), ("p", Three), ("act", c_int32),
        ("keep_u", c_int32), ("window", Pair), ("d_size", Pair), ("unused", c_int32),
    ]  # fmt: skip


class FewParams(Structure):
    _fields_ = [
        ("many", Operand), ("few", Operand), ("to", Epilogue), ("weight", c_void_p), ("weight_stride", c_int64 * 4),
        ("partials", c_void_p), ("images", c_int64), ("tiles", c_int64 * 2), ("each", c_int64),
        ("many_size", Pair), ("few_size", Pair), ("kernel", Pair), ("stride", Pair), ("padding", Pair),
        ("dilation", Pair), ("tile", Pair), ("rect", Pair), ("channels", c_int32), ("few_is_large", c_int32),
        ("wide", c_int32), ("lanes", c_int32), ("rows", c_int32), ("unused", c_int32),
    ]  # fmt: skip
