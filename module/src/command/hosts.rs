//! `FLORENCE.HOSTS`: where pictures came from.

use redis_module::{Context, RedisResult, RedisValue};

use super::{args::Args, stats::integer};
use crate::{
    server::reply::{self, bulk},
    source,
};

/// `FLORENCE.HOSTS`: for operators, since it tells where all pictures come from.
pub(super) fn run(_ctx: &Context, args: &mut Args) -> RedisResult {
    args.finish()?;
    let rows = source::hosts().into_iter().map(|(host, figures)| {
        reply::map([
            ("host", bulk(host)),
            ("downloads", integer(figures.downloads)),
            ("failures", integer(figures.failures)),
            ("bytes", integer(figures.bytes)),
            ("ms_total", integer(figures.ms)),
        ])
    });
    Ok(RedisValue::Array(rows.collect()))
}
