//! Jobs that have ended since the start, by how they ended and what they asked for.

use super::{Code, Job, State};
use crate::figures::{Asked, Counter};

/// How a job may end; a failed one with a code.
const ENDS: [(State, Option<Code>); 3 + Code::ALL.len()] = {
    let mut ends = [(State::Done, None); 3 + Code::ALL.len()];
    ends[1].0 = State::Cancelled;
    ends[2].0 = State::Expired;
    let mut i = 0;
    while i < Code::ALL.len() {
        ends[3 + i] = (State::Failed, Some(Code::ALL[i]));
        i += 1;
    }
    ends
};

static TALLY: [[Counter; Asked::COUNT]; ENDS.len()] =
    [const { [const { Counter::new() }; Asked::COUNT] }; ENDS.len()];

/// What a job asks for.
pub(super) fn asked(job: &Job) -> Asked {
    let has_steps = job.length("steps") > 0;
    let asked = |prompt: &[u8]| Asked::of_field(prompt, has_steps);
    job.bytes("prompt", asked).unwrap_or_else(|| asked(b""))
}

/// Counts the end of a job.
pub(super) fn count(state: State, code: Option<Code>, asked: Asked) {
    if let Some(end) = ENDS.iter().position(|end| *end == (state, code)) {
        TALLY[end][asked.index()].add(1);
    }
}

/// Those that there were: state, code, what was asked for, how many.
pub(crate) fn all() -> impl Iterator<Item = (State, Option<Code>, Asked, u64)> {
    let ends = ENDS.iter().zip(&TALLY);
    let all = ends.flat_map(|((state, code), counters)| {
        Asked::all().zip(counters).map(|(asked, count)| (*state, *code, asked, count.get()))
    });
    all.filter(|(.., count)| *count > 0)
}
