"""Generated scenes: coloured shapes and short words, with the exact answer to every Florence-2 task.

A scene is drawn at any size; its truth is kept in relative coordinates, so that the same scene
asks and answers all fifteen tasks. `models/tiny` is trained, evaluated and tested on these pictures.
"""

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (214, 32, 38), "green": (34, 150, 58), "blue": (36, 72, 206), "yellow": (246, 214, 36),
    "orange": (245, 130, 20), "purple": (128, 38, 160), "black": (18, 18, 20), "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": (0.17, 0.21), "medium": (0.27, 0.32), "large": (0.40, 0.46)}
WORDS = """STOP OPEN EXIT TAXI CAFE HOTEL BANK PARK SALE FREE NEWS BOOK SHOP PIZZA MUSIC WATER BUS ZOO
FIRE HELP LOVE HOME KEY MILK BREAD FISH TEA JAZZ GOLD MOON SUN STAR KING QUIZ VIDEO RADIO PHONE
NORTH SOUTH EAST WEST LEFT RIGHT PUSH PULL""".split()
FONTS = [f"/usr/share/fonts/truetype/{f}" for f in (
    "dejavu/DejaVuSans.ttf", "dejavu/DejaVuSans-Bold.ttf", "dejavu/DejaVuSerif-Bold.ttf",
    "liberation/LiberationSans-Regular.ttf", "liberation/LiberationSans-Bold.ttf",
    "liberation/LiberationSerif-Bold.ttf", "liberation/LiberationMono-Bold.ttf",
)]
BACKGROUNDS = ("plain", "gradient", "noisy")
# Mid tones, so that every one of the eight colours stands out.
GROUNDS = ((176, 190, 200), (200, 186, 170), (170, 196, 180), (196, 178, 196), (190, 190, 190), (160, 176, 196))

# The task sentences that Florence-2's processor puts in place of a task token.
PROMPTS = {
    "<OCR>": "What is the text in the image?",
    "<OCR_WITH_REGION>": "What is the text in the image, with regions?",
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
    "<OD>": "Locate the objects with category name in the image.",
    "<DENSE_REGION_CAPTION>": "Locate the objects in the image, with their descriptions.",
    "<REGION_PROPOSAL>": "Locate the region proposals in the image.",
    "<CAPTION_TO_PHRASE_GROUNDING>": "Locate the phrases in the caption: {input}",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "Locate {input} in the image with mask",
    "<REGION_TO_SEGMENTATION>": "What is the polygon mask of region {input}",
    "<OPEN_VOCABULARY_DETECTION>": "Locate {input} in the image.",
    "<REGION_TO_CATEGORY>": "What is the region {input}?",
    "<REGION_TO_DESCRIPTION>": "What does the region {input} describe?",
    "<REGION_TO_OCR>": "What text is in the region {input}?",
}


@dataclass
class Thing:
    """A shape or a word; `box` and `polygon` are relative to the picture, 0..1."""

    box: tuple
    polygon: list
    shape: str = ""
    colour: str = ""
    size: str = ""
    word: str = ""
    font: str = ""

    @property
    def centre(self):
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def category(self):
        return "word" if self.word else self.shape

    @property
    def name(self):
        return f"word {self.word}" if self.word else f"{self.colour} {self.shape}"

    @property
    def phrase(self):
        return f"the word {self.word}" if self.word else f"{article(self.colour)} {self.colour} {self.shape}"

    @property
    def description(self):
        return self.name if self.word else f"{self.size} {self.colour} {self.shape}"


@dataclass
class Scene:
    width: int
    height: int
    background: str
    ground: int
    things: list
    seed: int

    @property
    def shapes(self):
        return [t for t in self.things if t.shape]

    @property
    def words(self):
        return sorted((t for t in self.things if t.word), key=lambda t: t.centre[1])


def unit_polygon(shape):
    """The outline of a shape in the unit square, clockwise from the top."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "diamond":
        return [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    if shape == "cross":
        a, b = 0.33, 0.67
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    if shape == "star":
        points = [(math.sin(i * math.pi / 5) * r, -math.cos(i * math.pi / 5) * r)
                  for i in range(10) for r in ((1, 0.42)[i % 2],)]
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]
    steps = 12
    return [(0.5 + 0.5 * math.sin(2 * math.pi * i / steps), 0.5 - 0.5 * math.cos(2 * math.pi * i / steps))
            for i in range(steps)]


def place(rng, things, w, h):
    """A free box of relative size w x h, or None. Centres keep a distance in x, so that the
    left-to-right order is never a matter of a pixel."""
    for _ in range(60):
        x, y = rng.uniform(0.02, 0.98 - w), rng.uniform(0.02, 0.98 - h)
        box = (x, y, x + w, y + h)
        cx, cy = x + w / 2, y + h / 2
        if any(min(box[2], t.box[2]) - max(box[0], t.box[0]) > -0.015
               and min(box[3], t.box[3]) - max(box[1], t.box[1]) > -0.015 for t in things):
            continue
        if any(abs(cx - t.centre[0]) < 0.05 for t in things):
            continue
        # Keep off the borders between left, middle and right.
        if any(abs(cx - edge) < 0.025 for edge in (1 / 3, 2 / 3)):
            continue
        return box
    return None


def make_scene(seed, width=None, height=None, large=False):
    """The scene of a seed. `large` draws sizes from 200 to 1600 px, else up to about 480."""
    rng = random.Random(seed)
    if width is None:
        side = math.exp(rng.uniform(math.log(250), math.log(1500 if large else 420)))
        aspect = math.exp(rng.uniform(-0.4, 0.4))
        width = int(min(1600, max(200, side * math.sqrt(aspect))))
        height = int(min(1600, max(200, side / math.sqrt(aspect))))
    things, used = [], set()
    n_words = rng.choice((0, 1, 1, 2))
    n_shapes = rng.choice((1, 2, 3, 4))
    for word in rng.sample(WORDS, n_words):
        font = rng.choice(FONTS)
        cap = rng.uniform(0.11, 0.19) * height
        left, top, right, bottom = ImageFont.truetype(font, 100).getbbox(word)
        w, h = (right - left) * cap / (bottom - top) / width, cap / height
        if w > 0.9:
            w, h = 0.85, h * 0.85 / w
        box = place(rng, things, w, h)
        if box and not any(abs((box[1] + box[3]) / 2 - t.centre[1]) < 0.07 for t in things):
            x1, y1, x2, y2 = box
            things.append(Thing(box, [(x1, y1), (x2, y1), (x2, y2), (x1, y2)], word=word, font=font,
                                colour=rng.choice(("black", "white", "blue", "red"))))
    for _ in range(n_shapes):
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if (shape, colour) in used:
            continue
        for size in rng.sample(list(SIZES), 3):
            side = rng.uniform(*SIZES[size]) * min(width, height)
            box = place(rng, things, side / width, side / height)
            if box:
                break
        if not box:
            continue
        used.add((shape, colour))
        x1, y1, x2, y2 = box
        polygon = [(x1 + u * (x2 - x1), y1 + v * (y2 - y1)) for u, v in unit_polygon(shape)]
        things.append(Thing(box, polygon, shape=shape, colour=colour, size=size))
    if not any(t.shape for t in things):
        return make_scene(seed + 1_000_000_007, width, height)
    things.sort(key=lambda t: t.centre[0])
    return Scene(width, height, rng.choice(BACKGROUNDS), rng.randrange(len(GROUNDS)), things, seed)


def draw(scene):
    """The picture of a scene, RGB."""
    rng = random.Random(scene.seed ^ 0x5EED)
    w, h = scene.width, scene.height
    base = np.array(GROUNDS[scene.ground], np.float32) + rng.uniform(-14, 14)
    if scene.background == "gradient":
        dx, dy = rng.uniform(-40, 40), rng.uniform(-40, 40)
        grid = np.linspace(-0.5, 0.5, w)[None, :, None] * dx + np.linspace(-0.5, 0.5, h)[:, None, None] * dy
        pixels = base + grid
    else:
        pixels = np.broadcast_to(base, (h, w, 3)).copy()
    if scene.background == "noisy":
        noise = np.random.default_rng(scene.seed % 2**32).normal(0, rng.uniform(8, 20), (h, w, 1))
        pixels = pixels + noise
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")
    # Shapes are drawn twice as large into a mask, for smooth edges.
    for thing in scene.things:
        x1, y1, x2, y2 = (v * s for v, s in zip(thing.box, (w, h, w, h)))
        fill = tuple(int(min(255, max(0, c + rng.uniform(-14, 14)))) for c in COLOURS[thing.colour])
        if thing.word:
            left, top, right, bottom = ImageFont.truetype(thing.font, 100).getbbox(thing.word)
            size = max(6, round(100 * (y2 - y1) / (bottom - top)))
            font = ImageFont.truetype(thing.font, size)
            left, top, _, _ = font.getbbox(thing.word)
            ImageDraw.Draw(image).text((x1 - left, y1 - top), thing.word, fill=fill, font=font)
            continue
        ox, oy = int(x1), int(y1)
        mask = Image.new("L", (2 * (int(x2) - ox + 2), 2 * (int(y2) - oy + 2)))
        pen = ImageDraw.Draw(mask)
        if thing.shape == "circle":
            pen.ellipse([2 * (x1 - ox), 2 * (y1 - oy), 2 * (x2 - ox), 2 * (y2 - oy)], fill=255)
        else:
            pen.polygon([(2 * (x * w - ox), 2 * (y * h - oy)) for x, y in thing.polygon], fill=255)
        mask = mask.resize((mask.width // 2, mask.height // 2), Image.BOX)
        image.paste(fill, (ox, oy), mask)
    return image


def as_jpeg(image, quality):
    """The picture after a round through JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def locs(points):
    return "".join(f"<loc_{min(999, max(0, int(v * 1000)))}>" for p in points for v in p)


def box_locs(box):
    return locs([box[:2], box[2:]])


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def listing(items):
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def number(n, noun):
    return f"{('no', 'one', 'two', 'three', 'four')[n]} {noun}" + ("" if n == 1 else "s")


def where(x):
    return ("on the left", "in the middle", "on the right")[min(2, int(x * 3))]


def tasks(scene, rng):
    """Every task of a scene: a list of (task token, its text, the answer's text)."""
    things, words, shapes = scene.things, scene.words, scene.shapes
    thing, shape = rng.choice(things), rng.choice(shapes)
    caption = listing([t.phrase for t in things])
    detailed = "The image shows " + listing([f"a {t.description}" if t.shape else t.phrase for t in things]) + "."
    more = (f"The image shows {number(len(shapes), 'shape')} and {number(len(words), 'word')} "
            f"on a {scene.background} background.")
    for t in things:
        subject = f"A {t.description}" if t.shape else f"The word {t.word}"
        more += f" {subject} is {where(t.centre[0])}."
    some = [t for t in things if rng.random() < 0.7] or [thing]
    query, found = rng.choice((
        (thing.name, [thing]),
        (thing.category, [t for t in things if t.category == thing.category]),
    ))
    out = [
        ("<CAPTION>", "", caption),
        ("<DETAILED_CAPTION>", "", detailed),
        ("<MORE_DETAILED_CAPTION>", "", more),
        ("<OD>", "", "".join(t.category + box_locs(t.box) for t in things)),
        ("<DENSE_REGION_CAPTION>", "", "".join(t.description + box_locs(t.box) for t in things)),
        ("<REGION_PROPOSAL>", "", "".join(box_locs(t.box) for t in things)),
        ("<OCR>", "", " ".join(t.word for t in words)),
        ("<OCR_WITH_REGION>", "", "".join(t.word + locs(t.polygon) for t in words)),
        ("<CAPTION_TO_PHRASE_GROUNDING>", listing([t.phrase for t in some]),
         "".join(t.phrase + box_locs(t.box) for t in some)),
        ("<REFERRING_EXPRESSION_SEGMENTATION>", shape.phrase, locs(shape.polygon)),
        ("<REGION_TO_SEGMENTATION>", box_locs(shape.box), locs(shape.polygon)),
        ("<OPEN_VOCABULARY_DETECTION>", query, "".join(query + box_locs(t.box) if i == 0 else box_locs(t.box)
                                                       for i, t in enumerate(found))),
        ("<REGION_TO_CATEGORY>", box_locs(thing.box), thing.category),
        ("<REGION_TO_DESCRIPTION>", box_locs(thing.box), f"a {thing.description}" if thing.shape else thing.phrase),
    ]
    if words:
        word = rng.choice(words)
        out.append(("<REGION_TO_OCR>", box_locs(word.box), word.word))
    return out


def prompt_text(task, text):
    """The sentence that the processor makes of a task token and its text."""
    return PROMPTS[task].replace("{input}", text)
