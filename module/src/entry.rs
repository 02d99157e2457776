//! What the server calls, beside commands: events, and what becomes of blocked clients.

use crate::{
    celery, command,
    queue::{sync, waiters},
    server::Handlers,
};

/// Where each call of the server goes.
pub(crate) fn handlers() -> Handlers {
    Handlers {
        hash_changed: sync::hash_changed,
        key_changed: sync::key_changed,
        list_changed: celery::list_changed,
        role_changed: sync::role_changed,
        link_changed: sync::link_changed,
        loading_started: sync::loading_started,
        loading_aside: sync::loading_aside,
        loading_ended: sync::loading_ended,
        flushed: sync::flushed,
        swapped: sync::swapped,
        shutdown: sync::shutdown,
        key_ready: command::finished,
        freed: waiters::remove,
    }
}
