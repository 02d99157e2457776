//! Where pictures may come from: URLs, buckets, and files below the configured directories.

mod address;
mod files;
mod hosts;
mod inline;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::LazyLock,
    time::Instant,
};

use florence_engine::{
    Stop,
    fetch::{AccessRules, FetchError, FetchLimits, Fetcher, Rule},
};
use redis_module::RedisError;

use crate::{server::reply, settings};

pub(crate) use address::{
    MOST_BYTES, has_long_host, host_and_port, is_address, without_secrets, without_secrets_within,
};
pub(crate) use files::{FIRST_BYTE, byte_of};
pub(crate) use hosts::hosts;
pub(crate) use inline::{inline, is_inline};

/// The one client for all threads.
static FETCHER: LazyLock<Fetcher> = LazyLock::new(|| {
    let rules = AccessRules {
        allow_networks: (*settings::ALLOW_NETWORKS.get()).clone(),
        deny_networks: (*settings::DENY_NETWORKS.get()).clone(),
        allow_hosts: (*settings::ALLOW_HOSTS.get()).clone(),
        deny_hosts: (*settings::DENY_HOSTS.get()).clone(),
    };
    Fetcher::new(rules, (*settings::BUCKETS.get()).clone(), &settings::CA_FILE.get())
});

/// Makes the client, which takes time: not for the main thread.
pub(crate) fn make_client() {
    LazyLock::force(&FETCHER);
}

/// Why there are no bytes behind a URI.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the file is not below a directory of florence.file-roots")]
    NotBelowRoot,
    #[error("there is no such file")]
    Missing,
    #[error("the file cannot be read")]
    Unreadable,
    #[error("it is not a regular file")]
    NotRegular,
    #[error("the picture is larger than the limit of {0} bytes")]
    TooLarge(u64),
}

/// Why a host may not be asked, with the setting that decides it.
pub(crate) fn denial(rule: Rule) -> &'static str {
    match rule {
        Rule::AllowHosts => "the host is not in florence.allow-hosts",
        Rule::DenyHosts => "the host is in florence.deny-hosts",
        Rule::AllowNetworks => {
            "the host's address is neither public nor in florence.allow-networks"
        }
        Rule::DenyNetworks => "the host's address is in florence.deny-networks",
    }
}

/// An address as text, if what it names may be fetched at all; asked before a job is stored.
pub(crate) fn check(uri: &[u8]) -> Result<&str, RedisError> {
    if uri.len() > MOST_BYTES {
        let (length, most) = (uri.len(), MOST_BYTES);
        let text = format!("the image's address has {length} bytes, more than {most}");
        return Err(reply::error("ERR", text));
    }
    let uri = std::str::from_utf8(uri)
        .map_err(|_not_text| reply::error("ERR", "the image is not valid UTF-8"))?
        .trim_start();
    if let Some((scheme, _)) = address::remote(uri) {
        let host = address::host(uri);
        let (length, most) = (host.len(), address::MOST_HOST_BYTES);
        if length > most {
            let text = format!("the host's name has {length} bytes, more than {most}");
            return Err(reply::error("ERR", text));
        }
        if address::is_web(scheme)
            && let Some(rule) = FETCHER.rule_against(&host)
        {
            return Err(reply::error("DENIED", denial(rule)));
        }
        return Ok(uri);
    }
    let Some(path) = files::path(uri) else {
        let text = "the image must be an http(s), gs, s3 or data URL, an absolute path, DATA bytes \
            or KEY key";
        return Err(reply::error("ERR", text));
    };
    if files::is_below_root(&path) {
        return Ok(uri);
    }
    Err(reply::error("DENIED", SourceError::NotBelowRoot.to_string()))
}

/// Refuses a picture that is larger than allowed.
pub(crate) fn check_size(bytes: usize) -> Result<(), RedisError> {
    let limit = settings::MAX_IMAGE_BYTES.size();
    if bytes <= limit {
        return Ok(());
    }
    let text = format!("the image has {bytes} bytes, florence.max-image-bytes is {limit}");
    Err(reply::error("ERR", text))
}

/// The bytes behind a URI that a user asks for, if they come before the deadline, and before `stop`
/// says so.
pub(crate) fn read(
    uri: &str,
    user: &str,
    deadline: Instant,
    stop: &Stop,
) -> Result<Vec<u8>, SourceError> {
    if let Some(path) = files::path(uri) {
        return files::read(&path);
    }
    let left = deadline.saturating_duration_since(Instant::now());
    let limits = FetchLimits {
        bytes: settings::MAX_IMAGE_BYTES.get(),
        total: settings::FETCH_TIMEOUT_MS.milliseconds().min(left),
        asker: hash_of(user),
        ..FetchLimits::default()
    };
    let start = Instant::now();
    let fetched = FETCHER.fetch(uri, &limits, stop);
    let is_refused = fetched.as_ref().is_err_and(|error| {
        use FetchError::{BadObject, BadUrl, Denied};
        matches!(error, BadUrl | BadObject | Denied(_))
    });
    // Nobody was asked: there is nothing to tell of.
    if !is_refused {
        hosts::record(uri, start.elapsed(), fetched.as_ref().ok().map(Vec::len));
    }
    Ok(fetched?)
}

fn hash_of(user: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    user.hash(&mut hasher);
    hasher.finish()
}
