//! `FLORENCE.STATS [LATENCY|JOBS]`: the figures, the histograms of latencies, or how jobs ended.

use redis_module::{Context, RedisResult, RedisValue};

use super::args::{Args, is_word};
use crate::{
    figures::{self, COUNTERS, latency},
    job::tally,
    model::{self, Model},
    queue::{queue, retained, waiters},
    server::reply::{self, bulk},
    settings,
};

pub(super) fn run(_ctx: &Context, args: &mut Args) -> RedisResult {
    let reply = match args.option() {
        None => reply::map(figures().into_iter().map(|(name, n)| (name, integer(n)))),
        Some(word) if is_word(&word, "LATENCY") => latencies(),
        Some(word) if is_word(&word, "JOBS") => ends(),
        Some(word) => return Err(reply::syntax(word.as_slice())),
    };
    args.finish()?;
    Ok(reply)
}

pub(super) fn integer(n: u64) -> RedisValue {
    RedisValue::Integer(i64::try_from(n).unwrap_or(i64::MAX))
}

/// The figures that STATS and INFO show.
pub(super) fn figures() -> Vec<(&'static str, u64)> {
    let (waiting, active) = queue().counts();
    let uptime = u64::try_from(figures::uptime().as_millis()).unwrap_or(u64::MAX);
    let mut figures = vec![
        ("uptime_ms", uptime),
        ("paused", settings::PAUSED.get().into()),
        ("model_ready", matches!(model::model(), Model::Ready(_)).into()),
        ("jobs_waiting", waiting as u64),
        ("jobs_delayed", queue().delayed() as u64),
        ("jobs_active", active as u64),
        ("waiters", waiters::count() as u64),
    ];
    figures.extend(COUNTERS.iter().map(|(name, counter)| (*name, counter.get())));
    let (answers, pictures) = model::caches().bytes();
    let models = model::named();
    let engines: Vec<_> = models.iter().flat_map(|model| model.engines()).collect();
    figures.extend([
        ("models", models.len() as u64),
        ("models_leaving", model::leaving() as u64),
        ("engines", engines.len() as u64),
        ("engines_ready", engines.iter().filter(|engine| engine.is_ready()).count() as u64),
        ("cache_result_bytes", answers),
        ("cache_feature_bytes", pictures),
        ("retained_bytes", retained::bytes()),
    ]);
    figures.extend(memory());
    figures
}

/// What the engines hold beside the server's own memory.
fn memory() -> [(&'static str, u64); 7] {
    let (mut mapped, mut owned) = (0, 0);
    for engine in model::alive().iter().flat_map(|model| model.engines()) {
        if let Model::Ready(loaded) = &engine.model
            && !loaded.florence.shares_weights()
        {
            let weights = loaded.florence.model().weight_bytes();
            (mapped, owned) = (mapped + weights.mapped, owned + weights.owned);
        }
    }
    let (answers, pictures) = model::caches().bytes();
    [
        ("memory_weights_mapped", mapped),
        ("memory_weights_packed", owned),
        ("memory_caches", answers + pictures),
        ("memory_work", model::work().used()),
        ("memory_work_peak", model::work().peak()),
        ("memory_kv_cache", model::kv_cache().used()),
        ("memory_kv_cache_peak", model::kv_cache().peak()),
    ]
}

fn latencies() -> RedisValue {
    let rows = latency::all().map(|told| {
        let buckets = told.buckets().map(|(bound, count)| {
            RedisValue::Array(vec![RedisValue::Integer(bound), integer(count)])
        });
        reply::map([
            ("phase", bulk(told.phase)),
            ("task", bulk(told.asked.name())),
            ("count", integer(told.count())),
            ("sum_ms", integer(told.sum_ms)),
            ("buckets", RedisValue::Array(buckets.collect())),
        ])
    });
    RedisValue::Array(rows.collect())
}

fn ends() -> RedisValue {
    let rows = tally::all().map(|(state, code, asked, count)| {
        reply::map([
            ("state", bulk(state.name())),
            ("task", bulk(asked.name())),
            ("code", bulk(code.map_or("", |code| code.name()))),
            ("count", integer(count)),
        ])
    });
    RedisValue::Array(rows.collect())
}
