//! `florence draw`: an answer on its picture: boxes, quadrilaterals and polygons with their labels and
//! scores, and texts below.

mod layout;
mod marks;
mod paint;
mod svg;

use std::{
    io::{self, Cursor, Read},
    path::Path,
};

use anyhow::{Context, bail, ensure};
use florence_engine::image::{self as engine, DecodeLimits, Orientation};
use image::{ImageFormat, RgbImage, codecs::jpeg::JpegEncoder};
use redis::cmd;
use serde_json::{Value, json};

use crate::{
    servers::{in_environment, server},
    whole,
};
pub(crate) use marks::{Findings, Kind, Mark, Point};

/// Labels where they are drawn, for a page that draws them itself: the mark, the rectangle behind
/// (left, top, width, height), where the text begins, its size, its ink.
pub(crate) fn labels(marks: &Findings, size: (f32, f32)) -> anyhow::Result<Value> {
    let layout = layout::Layout::new(marks, size)?;
    let labels = layout.labels.iter().map(|label| {
        let (back, line) = (label.back, &label.line);
        json!({
            "mark": label.mark,
            "back": [back.x, back.y, back.width, back.height],
            "at": [line.x, line.baseline],
            "size": layout.font_size,
            "text": line.text,
            "ink": svg::hex(layout::ink(label.colour)),
        })
    });
    Ok(labels.collect())
}

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The picture, its answer, and the PNG, JPEG or SVG to write. The answer is JSON as `run`
    /// prints it, with or without --json, or FLORENCE.GET .. RESULT; - reads it from stdin. With
    /// --job there is no answer, and no picture if the job keeps one
    #[arg(value_name = "PICTURE ANSWER OUT", num_args = 1..=3, required = true)]
    names: Vec<String>,
    /// The job whose answer it is
    #[arg(long, value_name = "KEY")]
    job: Option<String>,
    /// The server that has the job (default: the one that `FLORENCE_REDIS` names)
    #[arg(long, value_name = "URL", requires = "job")]
    redis: Option<String>,
    /// Turn the picture as its EXIF tag says, as its answer was computed
    #[arg(long)]
    exif: bool,
}

/// What is drawn on what.
struct Drawing {
    picture: Vec<u8>,
    answer: Answer,
    exif: bool,
}

/// An answer, with what is known about it.
#[derive(Debug, Default)]
struct Answer {
    result: Value,
    scores: Value,
    prompt: String,
    /// Of the picture that it is about.
    size: Option<(f64, f64)>,
}

impl Answer {
    /// The answer alone, also after its picture's name as `run` writes it, or an object that has it:
    /// of `run --json`, or of a job.
    fn read(text: &str) -> anyhow::Result<Self> {
        let value = serde_json::from_str(text);
        let value: Value =
            value.or_else(|error| named(text).ok_or(error)).context("the answer is not JSON")?;
        ensure!(value.is_object(), "the answer is not a JSON object");
        let named = ["answer", "result"].into_iter().find(|name| value[*name].is_object());
        let Some(named) = named else { return Ok(Self { result: value, ..Self::default() }) };
        let size = value["width"].as_f64().zip(value["height"].as_f64());
        Ok(Self {
            result: value[named].clone(),
            scores: value["scores"].clone(),
            prompt: value["prompt"].as_str().unwrap_or_default().to_owned(),
            size,
        })
    }

    /// What it locates on a picture of this size.
    fn marks(&self, (width, height): (f64, f64)) -> Findings {
        let mut marks = Findings::read(&self.result, &self.scores);
        let asked = self.size.unwrap_or((width, height));
        marks.ask(&prompts(&self.prompt), asked);
        marks.scale((width / asked.0, height / asked.1));
        marks
    }
}

/// An answer after its picture's name, or after that and a beam's score; of several beams, each on a
/// line, the best is first.
fn named(text: &str) -> Option<Value> {
    let mut ends = text.match_indices(": ").filter(|(end, _)| !text[..*end].contains('\n'));
    // What begins as JSON is some that is broken.
    if text.starts_with("{\"") {
        return None;
    }
    ends.find_map(|(end, between)| {
        let rest = &text[end + between.len()..];
        let best = rest.split_once(' ').filter(|(score, _)| score.parse::<f64>().is_ok());
        let json = best.map_or(rest, |(_, rest)| rest.lines().next().unwrap_or_default());
        serde_json::from_str(json).ok().filter(Value::is_object)
    })
}

/// The prompts of a job or a line, which are a list in JSON if there are several.
pub(crate) fn prompts(prompt: &str) -> Vec<String> {
    serde_json::from_str(prompt).unwrap_or_else(|_one| vec![prompt.to_owned()])
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let (drawing, out) = drawing(args)?;
    let out = Path::new(out);
    let picture = decode(&drawing.picture, drawing.exif)?;
    let (width, height) = picture.dimensions();
    let marks = drawing.answer.marks((f64::from(width), f64::from(height)));
    let extension = out.extension().map(|it| it.to_string_lossy().to_ascii_lowercase());
    let bytes = match extension.as_deref() {
        Some("png") => png(picture, &marks)?,
        Some("jpg" | "jpeg") => drawn(&picture, &marks)?,
        Some("svg") => {
            // Pictures with a tag are written anew: programs do not agree about it.
            let is_plain = !engine::is_turned(&drawing.picture);
            let own = image::guess_format(&drawing.picture).ok().filter(|_| is_plain);
            let kept = own.filter(|it| matches!(it, ImageFormat::Png | ImageFormat::Jpeg));
            let plain = if kept.is_some() { Vec::new() } else { encode(&picture)? };
            let (bytes, kind) = match kept {
                Some(format) => (&drawing.picture, format.to_mime_type()),
                None => (&plain, "image/png"),
            };
            svg::svg((bytes, kind), (width, height), &marks)?.into_bytes()
        }
        _ => bail!("{} is to end in .png, .jpg or .svg", out.display()),
    };
    whole::write(out, &bytes).with_context(|| format!("cannot write {}", out.display()))?;
    tellln!("{}: {} outlines", out.display(), marks.marks.len());
    Ok(())
}

fn drawing(args: &Args) -> anyhow::Result<(Drawing, &str)> {
    let names: Vec<&str> = args.names.iter().map(String::as_str).collect();
    if let [sources @ .., out] = names.as_slice() {
        let is_source = |source: &&str| whole::is_same(Path::new(source), Path::new(out));
        ensure!(!sources.iter().any(is_source), "{out} would be written over: it is the picture");
    }
    let file = |path: &str| std::fs::read(path).with_context(|| format!("cannot read {path}"));
    match (&args.job, names.as_slice()) {
        (None, [picture, answer, out]) => {
            let mut text = (*answer).to_owned();
            if text == "-" {
                text.clear();
                io::stdin().read_to_string(&mut text).context("cannot read stdin")?;
            }
            let answer = Answer::read(&text)?;
            Ok((Drawing { picture: file(picture)?, answer, exif: args.exif }, out))
        }
        (Some(job), [picture @ .., out]) if picture.len() < 2 => {
            let url = match &args.redis {
                Some(url) => url.clone(),
                None => in_environment()?.context("which server? Give --redis")?,
            };
            let (answer, kept, exif) = of_job(&url, job)?;
            let picture = match picture {
                [path, ..] => file(path)?,
                [] => kept.with_context(|| format!("{job} keeps no picture: name its file"))?,
            };
            Ok((Drawing { picture, answer, exif: exif || args.exif }, out))
        }
        (None, _) => bail!("give the picture, its answer and the file to write"),
        (Some(_), _) => bail!("give the picture, unless the job keeps it, and the file to write"),
    }
}

/// A job's answer, the picture in its hash, and whether it was turned.
fn of_job(url: &str, key: &str) -> anyhow::Result<(Answer, Option<Vec<u8>>, bool)> {
    let mut connection =
        server::client(url)?.get_connection().context("cannot connect to the server")?;
    let job: Option<redis::Value> = cmd("FLORENCE.GET").arg(key).query(&mut connection)?;
    let job = job.with_context(|| format!("there is no job {key}"))?;
    let job: std::collections::HashMap<String, Option<String>> = redis::from_redis_value(&job)?;
    let text = |name: &str| job.get(name).cloned().flatten();
    let state = text("state").unwrap_or_default();
    let result = text("result").with_context(|| format!("{key} is {state} and has no answer"))?;
    let number = |name| text(name).and_then(|text| text.parse::<f64>().ok());
    let answer = Answer {
        result: serde_json::from_str(&result).context("the answer is not JSON")?,
        scores: serde_json::from_str(&text("scores").unwrap_or_default()).unwrap_or_default(),
        prompt: text("prompt").unwrap_or_default(),
        size: number("width").zip(number("height")),
    };
    let mut fields = |name: &str| -> redis::RedisResult<Option<Vec<u8>>> {
        cmd("HGET").arg(key).arg(name).query(&mut connection)
    };
    let exif = fields("exif")?.is_some_and(|exif| exif == b"1");
    let kept = fields("thumbnail")?.or(fields("data")?);
    Ok((answer, kept, exif))
}

/// A picture by its content, whatever its name.
pub(crate) fn read(bytes: &[u8]) -> anyhow::Result<RgbImage> {
    decode(bytes, false)
}

/// The pixels that the model sees: an answer's coordinates are theirs.
pub(crate) fn decode(bytes: &[u8], exif: bool) -> anyhow::Result<RgbImage> {
    let orientation = if exif { Orientation::Exif } else { Orientation::AsStored };
    let picture = engine::decode(bytes, &DecodeLimits::default(), orientation)?.into_rgb();
    let side = |side: usize| u32::try_from(side).context("the picture is too large");
    let (width, height) = (side(picture.width)?, side(picture.height)?);
    RgbImage::from_raw(width, height, picture.data).context("the picture is damaged")
}

/// The picture with its marks, as a PNG.
pub(crate) fn png(picture: RgbImage, marks: &Findings) -> anyhow::Result<Vec<u8>> {
    let painted = paint::paint(&picture, marks)?;
    drop(picture);
    encode(&painted)
}

/// The picture with its marks, as a JPEG.
pub(crate) fn drawn(picture: &RgbImage, marks: &Findings) -> anyhow::Result<Vec<u8>> {
    jpeg(&paint::paint(picture, marks)?)
}

fn encode(picture: &RgbImage) -> anyhow::Result<Vec<u8>> {
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png)?;
    Ok(png.into_inner())
}

fn jpeg(picture: &RgbImage) -> anyhow::Result<Vec<u8>> {
    const QUALITY: u8 = 92;
    let mut jpeg = Vec::new();
    picture.write_with_encoder(JpegEncoder::new_with_quality(&mut jpeg, QUALITY))?;
    Ok(jpeg)
}
