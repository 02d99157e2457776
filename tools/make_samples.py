"""Draws the sample pictures of models/tiny/samples, which the demo and the tests ask about."""

from pathlib import Path

import scenes

SAMPLES = Path(__file__).parent.parent / "models/tiny/samples"
# name, seed, width, height: seeds outside of what the model is trained on.
WANTED = (("shapes.png", 70_075, 360, 280), ("sign.png", 70_037, 360, 280), ("poster.jpg", 70_668, 640, 480),
          ("tall.png", 70_020, 260, 380))


def main():
    SAMPLES.mkdir(exist_ok=True)
    for name, seed, width, height in WANTED:
        scene = scenes.make_scene(seed, width, height)
        if name.endswith(".png"):
            scene.background = "plain"
        scenes.draw(scene).save(SAMPLES / name, quality=90)
        print(name, [t.description for t in scene.things])


if __name__ == "__main__":
    main()
