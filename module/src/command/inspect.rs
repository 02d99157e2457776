//! `FLORENCE.HOSTS` and `MODEL`: looking at the module.

use florence_engine::Florence;
use redis_module::{Context, RedisResult, RedisValue};

use super::{args::Args, stats::integer};
use crate::{
    model::{self, Model},
    server::reply::{self, bulk},
    settings::{self, Setting},
    source,
};

/// `FLORENCE.HOSTS`: for operators, since it tells where all pictures come from.
pub(super) fn hosts(_ctx: &Context, args: &mut Args) -> RedisResult {
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

/// `FLORENCE.MODEL`
pub(super) fn model(_ctx: &Context, args: &mut Args) -> RedisResult {
    args.finish()?;
    let (state, loaded, error) = match model::model() {
        Model::Loading => ("loading", None, RedisValue::Null),
        Model::Ready(loaded) => ("ready", Some(loaded), RedisValue::Null),
        Model::Failed(problem) => ("failed", None, bulk(problem)),
    };
    let florence = loaded.as_ref().map(|loaded| &loaded.florence);
    let name = florence.map_or(RedisValue::Null, |florence| bulk(florence.name()));
    let device = florence.map_or(RedisValue::Null, |_loaded| bulk(devices()));
    let note = florence.and_then(model::note).map_or(RedisValue::Null, bulk);
    let arithmetic = florence.map(Florence::arithmetic).unwrap_or_default();
    let (precision, kernels) = arithmetic.split_once(' ').unwrap_or_default();
    Ok(reply::map([
        ("state", bulk(state)),
        ("name", name),
        ("directory", bulk(settings::MODEL.text())),
        ("device", device),
        ("precision", bulk(precision)),
        ("kernels", bulk(kernels)),
        ("error", error),
        ("note", note),
    ]))
}

/// What the engines run on that are ready, each device once.
fn devices() -> String {
    let mut names: Vec<String> = Vec::new();
    for engine in model::engines() {
        if let Model::Ready(loaded) = &engine.model
            && !names.iter().any(|name| name == loaded.florence.device())
        {
            names.push(loaded.florence.device().to_owned());
        }
    }
    names.join("; ")
}
