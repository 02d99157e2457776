//! What a server has done to a body's bytes, as `Content-Encoding` tells, and its undoing.
//!
//! As requests has it: names in any case, several in a row, and what has no known name is no
//! encoding. Every step gives no more bytes than a picture may have.

use std::io::{self, BufRead, BufReader, Error, ErrorKind, Read};

use flate2::{Decompress, FlushDecompress, Status, bufread::GzDecoder};
use ureq::http::{HeaderMap, header::CONTENT_ENCODING};

/// What is asked for.
pub(super) const ACCEPTED: &str = "gzip, deflate";

/// More of them are no accident.
const MOST_CODINGS: usize = 5;

/// Most members of gzip, each of which takes its time, however small: those of a large picture in
/// blocks of 64 KiB.
const MOST_MEMBERS: u32 = 10_000;

enum Coding {
    Gzip,
    Deflate,
}

/// The body as it was before it was encoded.
pub(super) fn decoded<'r>(
    headers: &HeaderMap,
    body: impl Read + 'r,
    limit: u64,
) -> io::Result<Box<dyn Read + 'r>> {
    let values = headers.get_all(CONTENT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    let coding = |name: &str| match name.trim().to_ascii_lowercase().as_str() {
        "gzip" | "x-gzip" => Some(Coding::Gzip),
        "deflate" => Some(Coding::Deflate),
        _ => None,
    };
    let codings: Vec<Coding> =
        values.flat_map(|value| value.split(',')).filter_map(coding).collect();
    if codings.len() > MOST_CODINGS {
        return Err(ErrorKind::InvalidData.into());
    }
    let bounded = |reader| Box::new(Bounded { reader, limit, left: limit }) as Box<dyn Read + 'r>;
    // The last one that was applied comes off first.
    Ok(codings.into_iter().rev().fold(bounded(Box::new(body)), |body, coding| {
        bounded(match coding {
            Coding::Gzip => {
                Box::new(Gzip { member: None, rest: Some(BufReader::new(body)), members: 0 })
            }
            Coding::Deflate => {
                Box::new(Deflate { body: BufReader::new(body), state: None, is_over: false })
            }
        })
    }))
}

/// A reader that fails beyond a limit.
struct Bounded<'r> {
    reader: Box<dyn Read + 'r>,
    limit: u64,
    left: u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(to)?;
        match self.left.checked_sub(count as u64) {
            Some(left) => self.left = left,
            None => return Err(Error::other(ureq::Error::BodyExceedsLimit(self.limit))),
        }
        Ok(count)
    }
}

/// Members of gzip, one after the other; what follows the last one and is none is left alone.
struct Gzip<R: Read> {
    member: Option<GzDecoder<BufReader<R>>>,
    /// What no member has begun with.
    rest: Option<BufReader<R>>,
    members: u32,
}

impl<R: Read> Read for Gzip<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        const FIRST_BYTE: u8 = 0x1f;
        loop {
            if let Some(member) = &mut self.member {
                let count = member.read(to)?;
                if count > 0 || to.is_empty() {
                    return Ok(count);
                }
                self.rest = self.member.take().map(GzDecoder::into_inner);
            }
            let Some(rest) = &mut self.rest else { return Ok(0) };
            let next = rest.fill_buf()?;
            if next.is_empty() || (self.members > 0 && next[0] != FIRST_BYTE) {
                self.rest = None;
                return Ok(0);
            }
            self.members += 1;
            if self.members > MOST_MEMBERS {
                return Err(ErrorKind::InvalidData.into());
            }
            self.member = self.rest.take().map(GzDecoder::new);
        }
    }
}

/// `deflate` is the format of zlib, and as some servers have it the bare stream inside.
struct Deflate<R> {
    body: BufReader<R>,
    state: Option<Decompress>,
    is_over: bool,
}

impl<R: Read> Read for Deflate<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while !self.is_over {
            let input = self.body.fill_buf()?;
            let state = match (&mut self.state, input) {
                (Some(state), _) => state,
                // Nothing was encoded.
                (None, []) => break,
                // The low half of zlib's first byte is its method, which is always this one.
                (None, [first, ..]) => self.state.insert(Decompress::new(first & 0x0f == 8)),
            };
            let (was_in, was_out) = (state.total_in(), state.total_out());
            let is_end = input.is_empty();
            let status = state
                .decompress(input, to, FlushDecompress::None)
                .map_err(|error| Error::new(ErrorKind::InvalidData, error))?;
            let (taken, count) = (state.total_in() - was_in, state.total_out() - was_out);
            self.body.consume(usize::try_from(taken).unwrap_or_default());
            self.is_over = status == Status::StreamEnd;
            if count > 0 || to.is_empty() {
                return Ok(usize::try_from(count).unwrap_or_default());
            }
            if is_end && !self.is_over {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(0)
    }
}
