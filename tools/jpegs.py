"""Small JPEG files of every kind, for tools/pictures.py."""

import io
import random

import numpy as np

from PIL import Image

QUALITIES = (30, 50, 75, 90, 95, 100)


def scene(rng, width, height, channels=3):
    """Something between a photograph and noise."""
    small = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, channels), dtype=np.uint8)
    layers = [Image.fromarray(small[..., c]).resize((width, height), Image.BICUBIC) for c in range(channels)]
    noise = rng.integers(-9, 10, (height, width, channels))
    pixels = np.stack([np.asarray(layer) for layer in layers], axis=-1) + noise
    return np.clip(pixels, 0, 255).astype(np.uint8)


def saved(pixels, mode="RGB", **options):
    picture = Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), np.ascontiguousarray(pixels).tobytes())
    out = io.BytesIO()
    picture.save(out, "JPEG", **options)
    return out.getvalue()


def segments(data):
    """Marker, start and end of each segment up to the first scan's."""
    at, found = 2, []
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2:at + 4], "big")
        found.append((marker, at, at + 2 + length))
        at += 2 + length
        if marker == 0xda:
            return found


def frame(data):
    return next(start for marker, start, _ in segments(data) if 0xc0 <= marker <= 0xcf and marker != 0xc4)


def without(data, *markers):
    keep = [data[start:end] for marker, start, end in segments(data) if marker not in markers]
    return data[:2] + b"".join(keep) + data[segments(data)[-1][2]:]


def with_size(data, width, height, luma):
    """The same blocks in another arrangement."""
    out, at = bytearray(data), frame(data)
    out[at + 5:at + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    out[at + 11] = luma
    return bytes(out)


def with_ids(data, ids):
    out, at = bytearray(data), frame(data)
    _, scan, _ = segments(data)[-1]
    for i, name in enumerate(ids):
        out[at + 10 + 3 * i] = out[scan + 5 + 2 * i] = name
    return bytes(out)


JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")


def adobe(transform):
    return b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])


def with_markers(data, *markers):
    return data[:2] + b"".join(markers) + without(data, 0xe0, 0xee)[2:]


def scan_by_scan(rng, width, height, sampling, quality):
    """A file of one scan for each component, made of grey ones."""
    across, down = max(h for h, _ in sampling), max(v for _, v in sampling)
    scans = []
    for h, v in sampling:
        size = -(-width * h // across), -(-height * v // down)
        scans.append(saved(scene(rng, *size, 1)[..., 0], "L", quality=quality))
    first = scans[0]
    at = frame(first)
    components = b"".join(bytes([i + 1, h << 4 | v, 0]) for i, (h, v) in enumerate(sampling))
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    start = b"\xff\xc0" + (8 + len(components)).to_bytes(2, "big") + b"\x08" + size
    out = b"\xff\xd8" + JFIF + start + bytes([len(sampling)]) + components
    out += b"".join(first[a:b] for m, a, b in segments(first) if m in (0xdb, 0xc4))
    assert first[at + 9] == 1
    for i, scan in enumerate(scans):
        out += b"\xff\xda\x00\x08\x01" + bytes([i + 1]) + b"\x00\x00\x3f\x00" + scan[segments(scan)[-1][2]:-2]
    return out + b"\xff\xd9"


def plain(rng, size):
    """What Pillow writes."""
    for mode, channels in (("RGB", 3), ("L", 1), ("CMYK", 4)):
        for progressive in (False, True):
            for restart in ({}, {"restart_marker_blocks": 2}, {"restart_marker_rows": 1}):
                for subsampling in (0, 1, 2) if mode == "RGB" else (0,):
                    for _ in range(3 if mode == "RGB" else 2):
                        options = {"quality": random.choice(QUALITIES), "subsampling": subsampling, **restart}
                        options |= {"progressive": progressive, "optimize": random.random() < 0.3}
                        pixels = scene(rng, *size(), channels)
                        data = saved(pixels[..., 0] if mode == "L" else pixels, mode, **options)
                        yield f"{mode}-{subsampling}{'-progressive' * progressive}{'-restarts' * bool(restart)}", data
    for quality in range(30, 101, 5):
        for subsampling in (0, 1, 2):
            yield f"quality-{quality}-{subsampling}", saved(scene(rng, *size()), quality=quality,
                                                            subsampling=subsampling)
    for side in range(1, 35):
        other = random.randint(1, 34)
        yield f"side-{side}x{other}", saved(scene(rng, side, other), quality=90, subsampling=side % 3)


def arranged(rng, size):
    """Sampling that Pillow does not write: its blocks in other places."""
    for progressive in (False, True):
        for name, subsampling, luma, (across, down) in (
                ("440", 1, 0x12, (1, 2)), ("411", 2, 0x41, (4, 1)), ("441", 2, 0x14, (1, 4))):
            for _ in range(6):
                columns, rows = random.randint(1, 4), random.randint(1, 4)
                unit = (16, 8) if subsampling == 1 else (16, 16)
                data = saved(scene(rng, columns * unit[0], rows * unit[1]), quality=random.choice(QUALITIES),
                             subsampling=subsampling, progressive=progressive)
                width, height = columns * 8 * across, rows * 8 * down
                if not progressive:
                    width, height = width - random.randint(0, 8 * across - 1), height - random.randint(0, 8 * down - 1)
                yield f"{name}{'-progressive' * progressive}", with_size(data, width, height, luma)
    for sampling in ([(1, 1)] * 3, [(2, 1), (1, 1), (1, 1)], [(2, 2), (1, 1), (1, 1)], [(1, 2), (1, 1), (1, 1)],
                     [(4, 1), (1, 1), (1, 1)], [(3, 1), (1, 1), (1, 1)], [(2, 2), (2, 1), (2, 1)],
                     [(1, 1), (2, 1), (2, 1)], [(2, 2), (1, 2), (1, 2)], [(2, 1), (1, 2), (1, 1)],
                     [(1, 4), (1, 1), (1, 2)], [(2, 2), (2, 2), (2, 2)], [(1, 1)] * 4,
                     [(2, 2), (1, 1), (1, 1), (2, 2)]):
        for _ in range(4):
            name = "scans-" + "-".join(f"{h}{v}" for h, v in sampling)
            yield name, scan_by_scan(rng, *size(), sampling, random.choice(QUALITIES))


def coloured(rng, size):
    """Who says which colours there are: JFIF, Adobe, the names of the components."""
    for _ in range(3):
        for subsampling in (0, 2):
            data = saved(scene(rng, *size()), quality=90, subsampling=subsampling)
            for transform in (0, 1, 2, 9):
                yield f"adobe-{transform}", with_markers(data, adobe(transform))
                yield f"jfif-adobe-{transform}", with_markers(data, JFIF, adobe(transform))
                yield f"adobe-{transform}-jfif", with_markers(data, adobe(transform), JFIF)
            for ids in (b"RGB", b"rgb", b"\0\1\2", b"\1\2\3", b"YCc"):
                yield f"ids-{ids.hex()}", with_ids(with_markers(data), ids)
                yield f"jfif-ids-{ids.hex()}", with_ids(with_markers(data, JFIF), ids)
        yield "keep-rgb", saved(scene(rng, *size()), quality=90, keep_rgb=True)
        yield "jfif-2", with_markers(saved(scene(rng, *size())), JFIF[:11] + b"\2" + JFIF[12:])
        inks = saved(scene(rng, *size(), 4), "CMYK", quality=90)
        for transform in (0, 1, 2):
            yield f"inks-{transform}", with_markers(inks, adobe(transform))
        yield "inks-without-adobe", with_markers(inks)


def damaged(rng, size):
    """Ends that are missing, ends that come early, and bytes that have changed."""
    for progressive in (False, True):
        for _ in range(4):
            data = saved(scene(rng, *size()), quality=90, progressive=progressive,
                         restart_marker_blocks=random.choice((0, 4)))
            scan = segments(data)[-1][2]
            yield "trailing", data + bytes(random.randrange(256) for _ in range(40))
            yield "twice", data + data
            for more in range(10):
                yield f"no-end-{more}", data[:-2] + bytes(more)
            for cut in (1, 3, 4, 10, (len(data) - scan) // 2, len(data) - scan, len(data) - scan + 5, len(data) - 30):
                yield f"cut-{cut}", data[:-cut]
                yield f"cut-{cut}-with-end", data[:-cut] + b"\xff\xd9"
            for _ in range(6):
                changed = bytearray(data)
                for _ in range(random.choice((1, 1, 4))):
                    changed[random.randrange(scan, len(data))] = random.randrange(256)
                yield "changed", bytes(changed)
            yield "profile", data[:2] + b"\xff\xe2\x00\x12ICC_PROFILE\0\x07\x03??" + data[2:]
            yield "filled", data[:2] + b"\xff\xff\xff" + data[2:]


def left_out(rng, size):
    data = bytearray(saved(scene(rng, *size())))
    at = frame(data)
    for marker in (0xc3, 0xc5, 0xc9, 0xca, 0xcb, 0xcd):
        data[at + 1] = marker
        yield f"frame-{marker:x}", bytes(data)
    data[at + 1], data[at + 4] = 0xc1, 12
    yield "bits-12", bytes(data)


def files(rng, size):
    """Names, bytes, and what the engine says instead of Pillow."""
    for kind in (plain, arranged, coloured, damaged):
        for name, data in kind(rng, size):
            yield name, data, None
    for name, data in left_out(rng, size):
        yield name, data, "unsupported"
