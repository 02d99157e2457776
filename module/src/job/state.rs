//! Where a job stands, as its hash says.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Queued,
    Fetching,
    Running,
    Retrying,
    Done,
    Failed,
    Cancelled,
    Expired,
}

impl State {
    const ALL: [(Self, &'static str); 8] = [
        (Self::Queued, "queued"),
        (Self::Fetching, "fetching"),
        (Self::Running, "running"),
        (Self::Retrying, "retrying"),
        (Self::Done, "done"),
        (Self::Failed, "failed"),
        (Self::Cancelled, "cancelled"),
        (Self::Expired, "expired"),
    ];

    pub(crate) fn parse(name: &[u8]) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| known.as_bytes() == name).map(|(state, _)| *state)
    }

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(state, _)| *state == self).map_or("", |(_, name)| name)
    }

    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled | Self::Expired)
    }

    /// Whether the hash says that somebody works on the job.
    pub(crate) fn is_claimed(self) -> bool {
        matches!(self, Self::Fetching | Self::Running)
    }
}
