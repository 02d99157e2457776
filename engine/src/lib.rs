//! Florence-2 inference: a picture and a task prompt in, a caption, boxes, text or polygons out.
//!
//! The crate runs any Florence-2 checkpoint directory on candle, with the answers of the
//! reference implementation (Hugging Face `transformers`). It knows nothing of Redis.
//!
//! # Layout
//!
//! - [`task`]: the fifteen tasks and their sentences
//! - [`prompt`]: what the model can be asked
//! - [`image`]: bytes to RGB to pixel values, Pillow's arithmetic to the last bit
//! - `text`: prompt sentences to token ids and back
//! - `kernels`: what the network computes on the CPU
//! - [`model`]: DaViT, the projector and BART on candle tensors
//! - [`generate`]: greedy and beam search
//! - `postprocess`: answer text to the reference's JSON
//! - [`chain`]: questions about what other answers have found
//! - [`fetch`]: a picture's bytes from an `http(s)` URL
//! - [`Budget`]: working memory that threads share
//! - [`Florence`]: all of the above in one value
//! - [`serve`]: many jobs through one model, as they come
//!
//! # Example
//!
//! ```no_run
//! use florence_engine::{Florence, GenerateOptions, LoadOptions, PrepareOptions};
//!
//! # fn main() -> Result<(), florence_engine::Error> {
//! let florence = Florence::load("models/tiny".as_ref(), &LoadOptions::default())?;
//! let picture = std::fs::read("models/tiny/samples/shapes.png").expect("a sample picture");
//! let prepared = florence.prepare(&picture, "<OD>", &PrepareOptions::default())?;
//! let answer = florence.run_one(&prepared, &GenerateOptions::default())?;
//! println!("{}", answer.json);
//! # Ok(())
//! # }
//! ```
#![warn(missing_docs)]

mod budget;
pub mod chain;
mod child;
mod error;
pub mod fetch;
mod florence;
pub mod generate;
pub mod image;
mod kernels;
pub mod model;
mod panics;
mod postprocess;
pub mod prompt;
pub mod serve;
mod stop;
pub mod task;
mod text;

pub use budget::{Budget, NoRoom, Reservation};
pub use error::Error;
pub use florence::{
    Answer, Batch, Device, Florence, Followed, GenerateOptions, Job, Kernels, LoadOptions, Part,
    Picture, Precision, PrepareOptions, Prepared, Question, Ranked, Timings, TokenIds, Visual,
    has_cpu,
};
pub use kernels::Cpu;
/// The kernels one by one, for benchmarks.
#[cfg(feature = "bench")]
pub use kernels::bench;
pub use model::cuda_devices;
pub use panics::catch_panic;
pub use postprocess::{Coordinates, Decimals, UnknownCoordinates, UnknownDecimals};
pub use stop::Stop;

/// Says that a test did not run; the print macros are captured, this is not.
#[cfg(test)]
fn not_run(why: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "\nNOT RUN: {why}");
}
