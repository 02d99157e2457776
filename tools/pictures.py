"""Small picture files of every kind, and what Pillow makes of them: the packs that
engine/tests/golden_pictures.rs reads.

    python tools/pictures.py          needs pillow and numpy

For each file there is a line `name bytes result`, then its bytes.
The result is the SHA-256 of Pillow's RGB bytes, `error`, or `unsupported` for what the engine leaves out.
"""

import hashlib
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

import jpegs
from jpegs import scene

FIXTURES = Path(__file__).parent.parent / "engine/tests/fixtures"


def noise(rng, length, below=256):
    return rng.integers(0, below, length, dtype=np.uint8).tobytes()


def written(picture, form, **options):
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def modes(rng, size):
    """A picture in each of Pillow's modes that files have."""
    width, height = size()
    colours = Image.fromarray(scene(rng, width, height))
    alpha = Image.fromarray(scene(rng, width, height, 4))
    grey = np.asarray(colours.convert("L"))
    yield from ((mode, colours.convert(mode)) for mode in ("RGB", "L", "1", "CMYK", "YCbCr"))
    yield from (("RGBA", alpha), ("LA", alpha.convert("LA")))
    yield from ((f"P{colors}", colours.quantize(colors)) for colors in (2, 17, 200))
    yield "I16-low", Image.fromarray(grey.astype(np.uint16) * 3)
    yield "I16", Image.fromarray(grey.astype(np.uint16) * 257)
    yield "I", Image.fromarray(grey.astype(np.int32) * 5 - 200)
    yield "F", Image.fromarray(grey.astype(np.float32) * 1.7 - 50)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header, rows, *before, after=b"", end=chunk(b"IEND", b"")):
    """Of width, height, bits, kind of colour, and whether it is interlaced."""
    width, height, bits, colour, interlaced = header
    start = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + b"".join(before) + chunk(b"IDAT", zlib.compress(rows))
            + after + end)


def unfiltered(rows):
    return b"".join(b"\0" + bytes(row) for row in rows)


def interlaced(pixels):
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = (pixels[top::down, left::across] for left, top, across, down in passes)
    return b"".join(unfiltered(part.tobytes() for part in part) for part in parts if part.size)


def pngs(rng, size):
    for _ in range(2):
        for mode, picture in modes(rng, size):
            if mode not in ("CMYK", "YCbCr", "F"):
                yield mode, written(picture, "PNG", optimize=random.random() < 0.5), None
        width, height = size()
        for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
            for bits in (1, 2, 4, 8, 16) if colour == 0 else (8, 16):
                rows = unfiltered(noise(rng, -(-width * channels * bits // 8)) for _ in range(height))
                header = (width, height, bits, colour, 0)
                yield f"colour-{colour}-{bits}", png(header, rows), None
                yield f"gamma-{colour}-{bits}", png(header, rows, chunk(b"gAMA", struct.pack(">I", 45455))), None
                if colour in (0, 2):
                    clear = chunk(b"tRNS", b"\0\1" * channels)
                    yield f"transparent-{colour}-{bits}", png(header, rows, clear), None
        for bits in (1, 2, 4, 8):
            rows = unfiltered(noise(rng, -(-width * bits // 8)) for _ in range(height))
            for colors in (2**bits, max(1, 2**bits // 2)):
                palette = chunk(b"PLTE", noise(rng, 3 * colors))
                yield f"palette-{bits}", png((width, height, bits, 3, 0), rows, palette), None
                clear = chunk(b"tRNS", b"\0\x80"[:colors])
                yield f"palette-transparent-{bits}", png((width, height, bits, 3, 0), rows, palette, clear), None
    for width, height in ((33, 21), (1, 1), (3, 2), (5, 9), (2, 30)):
        pixels = scene(rng, width, height)
        yield "interlaced", png((width, height, 8, 2, 1), interlaced(pixels)), None
        yield "interlaced-no-end", png((width, height, 8, 2, 1), interlaced(pixels), end=b""), None
    frames = [Image.fromarray(scene(rng, 20, 20)) for _ in range(2)]
    for is_apart in (False, True):
        options = {"save_all": True, "append_images": frames[1:], "default_image": is_apart}
        yield "animated", written(frames[0], "PNG", **options), None


def damaged_pngs(rng, size):
    pixels = scene(rng, 33, 21)
    header, rows = (33, 21, 8, 2, 0), unfiltered(row.tobytes() for row in pixels)
    whole = png(header, rows)
    at = whole.index(b"IDAT")
    end = at + 4 + struct.unpack(">I", whole[at - 4:at])[0]
    for name, place in (("rows-checksum", end), ("header-checksum", 29), ("zlib-checksum", end - 1),
                        ("header", 19), ("rows", end - 30)):
        changed = bytearray(whole)
        changed[place] ^= 1
        yield name, bytes(changed), None
    text = chunk(b"tEXt", b"a\0b")
    yield "text-checksum", png(header, rows, text[:-1] + bytes([text[-1] ^ 1])), None
    yield "text-checksum-after", png(header, rows, after=text[:-1] + bytes([text[-1] ^ 1])), None
    yield "critical-after", png(header, rows, after=chunk(b"ABCD", b"xx")), None
    yield "trailing", whole + b"more" * 9, None
    for cut in (1, 4, 8, 11, 12, 13, 14, 15, 16, 17, 18, 20, 25, 40, 100, len(whole) - 40, len(whole) - 20):
        yield f"cut-{cut}", whole[:-cut], None
    packed = zlib.compress(rows)
    start, last = whole[:at - 4], chunk(b"IEND", b"")
    parts = b"".join(chunk(b"IDAT", packed[i:i + 100]) for i in range(0, len(packed), 100))
    yield "parts", start + parts + last, None
    yield "parts-apart", start + chunk(b"IDAT", packed[:100]) + text + chunk(b"IDAT", packed[100:]) + last, None
    yield "no-zlib-checksum", start + chunk(b"IDAT", packed[:-4]) + last, None
    yield "cut-inside", start + chunk(b"IDAT", packed[:-40]) + last, None
    yield "filter", png(header, b"\7" + rows[1:]), None
    yield "more-rows", png(header, rows + rows[:100]), None
    # Pillow leaves rows black that a complete stream does not have.
    for missing in (1, 50, 100):
        yield f"missing-{missing}", png(header, rows[:-missing]), "error"


def gif(rng, screen, frame, colors=8, local=0, clear=None, bits=8, count=None, end=b";", **flags):
    """A frame of random pixels: left, top, width, height."""
    width, height = screen
    _, _, across, down = frame
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x70 | (0x80 | colors - 1 if colors else 0),
                                  flags.get("background", 0), 0)
    out += noise(rng, 3 * 2**colors) if colors else b""
    out += flags.get("before", b"")
    if clear is not None or "dispose" in flags:
        out += b"\x21\xf9\4" + struct.pack("<BHB", (clear is not None) | flags.get("dispose", 0) << 2, 0, clear or 0)
        out += b"\0"
    packed = (0x80 | local - 1 if local else 0) | flags.get("interlaced", 0) << 6
    out += b"," + struct.pack("<HHHHB", *frame, packed) + (noise(rng, 3 * 2**local) if local else b"")
    return out + lzw(noise(rng, across * down if count is None else count, 2**bits), bits) + end


def lzw(pixels, bits):
    """Codes that never grow: the table is cleared before it would."""
    clear, acc, length, out = 1 << bits, 0, 0, bytearray()
    codes = []
    for i, pixel in enumerate(pixels):
        codes += [clear, pixel] if i % max(1, clear - 2) == 0 else [pixel]
    for code in [*codes, clear + 1]:
        acc |= code << length
        length += bits + 1
        while length >= 8:
            out.append(acc & 255)
            acc >>= 8
            length -= 8
    if length:
        out.append(acc)
    blocks = (out[i:i + 255] for i in range(0, len(out), 255))
    return bytes([bits]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def gifs(rng, size):
    for _ in range(2):
        for mode, picture in modes(rng, size):
            if mode not in ("CMYK", "YCbCr", "F", "I", "I16", "I16-low"):
                yield mode, written(picture, "GIF", interlace=random.random() < 0.5), None
    whole, part = (0, 0, 20, 10), (3, 2, 10, 5)
    for name, screen, frame, options in (
            ("whole", (20, 10), whole, {}), ("part", (20, 10), part, {}),
            ("part-background", (20, 10), part, {"background": 7}),
            ("part-clear", (20, 10), part, {"clear": 9, "background": 3}),
            ("part-clear-local", (20, 10), part, {"clear": 9, "local": 8}),
            ("part-clear-outside", (20, 10), part, {"clear": 200, "colors": 4, "bits": 4}),
            ("clear", (20, 10), whole, {"clear": 9}), ("local", (20, 10), whole, {"local": 8}),
            ("part-local", (20, 10), part, {"local": 8}), ("only-local", (20, 10), whole, {"colors": 0, "local": 8}),
            ("short-palette", (20, 10), whole, {"colors": 4}),
            ("larger", (20, 10), (0, 0, 30, 15), {}), ("larger-part", (20, 10), (12, 4, 30, 15), {}),
            ("wider", (20, 10), (12, 4, 30, 5), {}), ("higher", (20, 10), (3, 4, 5, 15), {}),
            ("outside", (20, 10), (40, 30, 5, 5), {}),
            ("screen-0x0", (0, 0), (0, 0, 3, 2), {}), ("screen-0x5", (0, 5), (0, 0, 3, 2), {}),
            ("screen-5x0", (5, 0), (1, 1, 3, 2), {}),
            ("frame-0x0", (20, 10), (0, 0, 0, 0), {}), ("frame-0x5", (20, 10), (0, 0, 0, 5), {}),
            ("short", (20, 10), whole, {"count": 150}), ("long", (20, 10), whole, {"count": 250}),
            ("interlaced", (20, 13), (0, 0, 20, 13), {"interlaced": 1}),
            ("interlaced-part", (20, 20), (3, 2, 11, 13), {"interlaced": 1}),
            ("dispose-2", (20, 10), part, {"dispose": 2, "background": 4}), ("dispose-3", (20, 10), part, {"dispose": 3}),
            ("no-end", (20, 10), whole, {"end": b""}), ("trailing", (20, 10), whole, {"end": b"; and more"}),
            ("bits-1", (20, 10), whole, {"colors": 1, "bits": 2}), ("bits-2", (20, 10), whole, {"colors": 2, "bits": 2}),
            ("comment", (20, 10), whole, {"before": b"\x21\xfe\5hello\0"})):
        yield name, gif(rng, screen, frame, **options), None
    data = gif(rng, (20, 10), whole)
    yield "87a", b"GIF87a" + data[6:], None
    yield "no-frame", data[:13 + 768] + b";", None
    for cut in (5, 20, 100, 300):
        yield f"cut-{cut}", data[:-cut], None
    frames = [Image.fromarray(scene(rng, 20, 20)).quantize(30) for _ in range(3)]
    yield "animated", written(frames[0], "GIF", save_all=True, append_images=frames[1:]), None


def webps(rng, size):
    def picture(width, height, channels):
        return Image.fromarray(scene(rng, width, height, channels))

    for options in ({"lossless": True}, {"quality": 60}, {"lossless": True, "exact": True}):
        for channels in (3, 4):
            for _ in range(3):
                data = written(picture(*size(), channels), "WEBP", **options)
                yield f"{channels}", data, None
            for cut in (1, 2, 5, 20, len(data) - 30, len(data) - 12):
                yield f"cut-{cut}", data[:-cut], None
            yield "trailing", data + b"more" * 5, None
            frames = [picture(21, 17, channels) for _ in range(3)]
            animation = {"save_all": True, "append_images": frames[1:], **options}
            yield "animated", written(frames[0], "WEBP", **animation), None
            yield "animated-background", written(frames[0], "WEBP", background=(9, 200, 3, 255), **animation), None
        part = Image.new("RGBA", (30, 30))
        part.paste(picture(8, 6, 4), (10, 12))
        frames = [part, picture(30, 30, 4)]
        yield "animated-part", written(part, "WEBP", save_all=True, append_images=frames[1:], **options), None
        yield "exif", written(picture(9, 7, 3), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", **options), None


def bmp(width, height, bits, rows, palette=b"", compression=0, masks=b"", header=40, used=0):
    if header > 40:
        header, masks = header, masks.ljust(header - 40, b"\0")
        offset = 14 + header + len(palette)
    else:
        offset = 14 + header + len(masks) + len(palette)
    start = b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset)
    start += struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(rows), 0, 0, used, 0)
    return start + masks + palette + rows


def bmps(rng, size):
    for mode, picture in modes(rng, size):
        if mode not in ("CMYK", "YCbCr", "F", "I", "I16", "I16-low", "LA"):
            yield mode, written(picture, "BMP"), None
    for width, height in ((7, 5), (8, 8), (33, 4)):
        for bits in (1, 4, 8, 24, 32):
            stride = -(-width * bits // 32) * 4
            rows, palette = noise(rng, stride * height), noise(rng, 4 * 2**bits) if bits <= 8 else b""
            yield f"{bits}", bmp(width, height, bits, rows, palette), None
            yield f"{bits}-from-top", bmp(width, -height, bits, rows, palette), None
            yield f"{bits}-header", bmp(width, height, bits, rows, palette, header=124), None
            yield f"{bits}-cut", bmp(width, height, bits, rows[:-stride], palette), None
            if bits <= 8:
                half = palette[:4 * (2**bits // 2)]
                yield f"{bits}-half-palette", bmp(width, height, bits, rows, half, used=2**bits // 2), None
            if bits == 32:
                masks = struct.pack("<III", 0xff0000, 0xff00, 0xff)
                yield "32-masks", bmp(width, height, bits, rows, compression=3, masks=masks), None
                masks += struct.pack("<I", 0xff000000)
                yield "32-masks-alpha", bmp(width, height, bits, rows, compression=3, masks=masks, header=108), None
    palette = noise(rng, 1024)
    runs = bytes([4, 9, 3, 7, 0, 0]) * 5 + b"\0\1"
    yield "runs", bmp(7, 5, 8, runs, palette, compression=1), None
    yield "runs-cut", bmp(7, 5, 8, runs[:10], palette, compression=1), None
    yield "runs-4", bmp(7, 5, 4, bytes([4, 0x91, 3, 0x72, 0, 0]) * 5 + b"\0\1", palette[:64], compression=2), None
    literal = bytes([0, 5, 1, 2, 3, 4, 5, 0, 2, 9, 0, 0]) * 5 + b"\0\1"
    yield "literal", bmp(7, 5, 8, literal, palette, compression=1), None


def tiffs(rng, size):
    left_out = ("LA", "P2", "P17", "P200", "YCbCr", "I", "F")
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        for mode, picture in modes(rng, size):
            data = written(picture, "TIFF", compression=compression)
            yield f"{mode}-{compression}", data, "unsupported" if mode in left_out else None
            if mode == "RGB":
                for cut in (len(data) // 2, len(data) - 10):
                    yield "cut", data[:-cut], None
    for mode in ("RGB", "L"):
        picture = Image.fromarray(scene(rng, *size())).convert(mode)
        yield f"{mode}-jpeg", written(picture, "TIFF", compression="jpeg"), "unsupported"
    fax = Image.fromarray(scene(rng, *size())).convert("1")
    yield "1-group3", written(fax, "TIFF", compression="group3"), "unsupported"
    yield "1-group4", written(fax, "TIFF", compression="group4"), None


def tiff(width, height, samples, bits=(8, 8, 8), photometric=2, extra=None, **tags):
    """Chunky and not compressed; Pillow writes few of these kinds."""
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: len(bits), 278: height,
               279: len(samples), **({338: extra} if extra else {}), **{int(name[1:]): it for name, it in tags.items()}}
    entries[273] = 8
    start, values = 8 + len(samples) + len(samples) % 2, b""
    end, table = start + 2 + 12 * len(entries) + 4, b""
    for tag, value in sorted(entries.items()):
        values_of = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"<{len(values_of)}{'I' if tag in (273, 279) else 'H'}", *values_of)
        kind = 4 if tag in (273, 279) else 3
        if len(packed) > 4:
            packed, values = struct.pack("<I", end + len(values)), values + packed + b"\0" * (len(packed) % 2)
        table += struct.pack("<HHI", tag, kind, len(values_of)) + packed.ljust(4, b"\0")
    return (struct.pack("<2sHI", b"II", 42, start) + samples + b"\0" * (len(samples) % 2)
            + struct.pack("<H", len(entries)) + table + struct.pack("<I", 0) + values)


def odd_tiffs(rng, size):
    for turn in range(10):
        for mode in ("RGB", "L"):
            picture = Image.fromarray(scene(rng, *size())).convert(mode)
            yield f"turn-{turn}", written(picture, "TIFF", tiffinfo={274: turn}), None
    fax = Image.fromarray(scene(rng, *size())).convert("1")
    for compression in (None, "packbits", "group4", "tiff_lzw", "tiff_adobe_deflate"):
        for picture in (fax, fax.convert("L"), Image.fromarray(scene(rng, *size()))):
            if picture.mode == "1" or compression not in ("group4",):
                data = written(picture, "TIFF", compression=compression, tiffinfo={266: 2})
                yield f"lowest-first-{picture.mode}-{compression}", data, None
            if picture.mode == "RGB" and compression != "group4":
                data = written(picture, "TIFF", compression=compression, tiffinfo={317: 2})
                is_applied = compression in ("tiff_lzw", "tiff_adobe_deflate")
                yield f"differences-{compression}", data, None if is_applied else "unsupported"
    for compression in (None, "tiff_lzw", "packbits"):
        inks = Image.frombytes("CMYK", (64, 33), noise(rng, 64 * 33 * 4))
        yield f"inks-{compression}", written(inks, "TIFF", compression=compression), None
    width, height = 31, 17
    # Of 16 bits only those up to 255 are told apart.
    greys = bytes(byte for low in noise(rng, width * height) for byte in (low, low & 1))
    yield "negative-16", tiff(width, height, greys, (16,), 0), None
    yield "negative-8", tiff(width, height, noise(rng, width * height), (8,), 0), None
    yield "inks-16", tiff(width, height, noise(rng, width * height * 8), (16,) * 4, 5), None
    yield "inks-extra", tiff(width, height, noise(rng, width * height * 5), (8,) * 5, 5, (0,)), None
    for bits in (8, 16):
        for extra in ((0,), (1,), (2,)):
            samples = noise(rng, width * height * 4 * bits // 8)
            yield f"extra-{bits}-{extra[0]}", tiff(width, height, samples, (bits,) * 4, 2, extra), None
    for extra in ((0, 0), (1, 0), (2, 0), (1, 0, 0)):
        samples = noise(rng, width * height * (3 + len(extra)))
        yield "extras", tiff(width, height, samples, (8,) * (3 + len(extra)), 2, extra), None
    for kind in (1, 3):
        samples = noise(rng, width * height * 12)
        yield f"32-bits-{kind}", tiff(width, height, samples, (32,) * 3, _339=(kind,) * 3), "unsupported"
    yield "32-bits", tiff(width, height, noise(rng, width * height * 12), (32,) * 3), "unsupported"
    for mode in ("RGB", "L", "1", "CMYK"):
        for compression in (None, "tiff_lzw"):
            picture = Image.fromarray(scene(rng, *size())).convert(mode)
            yield f"big-{mode}", written(picture, "TIFF", compression=compression, big_tiff=True), None
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate"):
        for is_big in (False, True):
            picture = Image.fromarray(scene(rng, *size(), 4)).convert("RGBX")
            data = written(picture, "TIFF", compression=compression, big_tiff=is_big,
                           tiffinfo={317: 2} if compression else {})
            yield f"fourth-{compression}", data, None


# What the engine does with files of other writers that it does not read as Pillow does.
INSTEAD = {"jt-arith": "unsupported", "png-missing-row": "error", "tiff-planes-tiled": "unsupported",
           "tiff-extras-lzw": "unsupported"}


def from_elsewhere(folder):
    """Files that other decoders failed at."""
    def kept(_rng, _size):
        for file in sorted((FIXTURES / folder).iterdir()):
            yield file.stem, file.read_bytes(), INSTEAD.get(file.stem)
    return kept


def result(data):
    try:
        rgb = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return "error"
    return hashlib.sha256(rgb.tobytes()).hexdigest()


def write(name, seed, *kinds):
    rng = np.random.default_rng(seed)
    random.seed(seed)

    def size():
        return random.randint(1, 40), random.randint(1, 40)

    found = []
    with open(FIXTURES / name, "wb") as out:
        for kind in kinds:
            for label, data, instead in kind(rng, size):
                found.append(instead or result(data))
                out.write(f"{label} {len(data)} {found[-1]}\n".encode() + data)
    print(f"{name}: {len(found)} files, {found.count('error')} refused, {found.count('unsupported')} left out")


if __name__ == "__main__":
    write("jpegs.pack", 16, jpegs.files, from_elsewhere("jpegs"))
    write("pictures.pack", 17, pngs, damaged_pngs, gifs, webps, bmps, tiffs, from_elsewhere("decoded"), odd_tiffs)
