"Ways in which a file can be damaged, for tests of what notices it."

from safetensors.torch import load_file, save_file


def change(path, f):
    tensors = load_file(path)
    f(tensors, min(tensors))
    save_file(tensors, path, metadata=dict(format="pt"))


def missing(f):
    f.unlink()


def empty(f):
    f.write_bytes(b"")


def cut(f):
    f.write_bytes(f.read_bytes()[:-7])


def flip(path):
    b = bytearray(path.read_bytes())
    b[len(b) // 2] ^= 1
    path.write_bytes(b)
