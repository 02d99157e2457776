//! A job's picture, as far as its hash has it: pictures at addresses are fetched by nobody but the
//! server that answered the job.

use florence_engine::task::{Input, Task};
use image::{ImageFormat, RgbImage};
use redis::{Cmd, cmd};

use super::{
    jobs::{self, Named},
    routes::Refusal,
};
use crate::{draw, servers::server::Server};

/// What a task takes after its token, for the page's form.
pub(super) fn input(task: Task) -> &'static str {
    match task.input() {
        Input::None => "none",
        Input::Text => "text",
        Input::Region => "region",
    }
}

/// The picture that is kept in the job's hash, a thumbnail if there is one, and its kind.
pub(super) async fn kept(server: &Server, job: &Named) -> Result<(&'static str, Vec<u8>), Refusal> {
    for field in ["thumbnail", "data"] {
        let mut command: Cmd = cmd("HGET");
        command.arg(job.id.bytes()).arg(field);
        let bytes: Option<Vec<u8>> = server.call(&command).await?;
        // Whatever else somebody has put there is not passed on.
        if let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty())
            && let Some(kind) = kind(&bytes)
        {
            return Ok((kind, bytes));
        }
    }
    Err(Refusal::missing("the job keeps no picture that a browser can show"))
}

fn kind(bytes: &[u8]) -> Option<&'static str> {
    match image::guess_format(bytes).ok()? {
        format @ (ImageFormat::Jpeg
        | ImageFormat::Png
        | ImageFormat::WebP
        | ImageFormat::Gif
        | ImageFormat::Bmp) => Some(format.to_mime_type()),
        _ => None,
    }
}

/// The picture with what the answer locates drawn on it, as a PNG; on white, if none is kept.
pub(super) async fn annotated(server: &Server, job: &Named) -> Result<Vec<u8>, Refusal> {
    let map = jobs::get(server, job).await?;
    let mut marks = jobs::marks(&map);
    let size = |name: &str| map[name].as_f64().filter(|size| *size >= 1.0);
    let (Some(width), Some(height)) = (size("width"), size("height")) else {
        return Err(Refusal::missing("the job has no answer (yet)"));
    };
    let kept = kept(server, job).await.ok();
    let drawn = tokio::task::spawn_blocking(move || {
        let picture = kept.and_then(|(_, bytes)| draw::read(&bytes).ok());
        let picture = picture.unwrap_or_else(|| blank(width, height));
        let (w, h) = picture.dimensions();
        marks.scale((f64::from(w) / width, f64::from(h) / height));
        draw::png(picture, &marks)
    });
    let drawn = drawn.await.map_err(|_panic| Refusal::bad("the picture cannot be drawn"))?;
    drawn.map_err(|_problem| Refusal::bad("the picture cannot be drawn"))
}

/// A white picture of these proportions.
fn blank(width: f64, height: f64) -> RgbImage {
    const LONGER: f64 = 1024.0;
    let scale = (LONGER / width.max(height)).min(1.0);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 1024")]
    let side = |side: f64| (side * scale).round().max(1.0) as u32;
    RgbImage::from_pixel(side(width), side(height), image::Rgb([255; 3]))
}
