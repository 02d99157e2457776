//! `INFO florence`: the figures, the state of the model, and percentiles of latencies.

use redis_module::InfoContext;

use super::stats::figures;
use crate::{
    figures::{self, latency},
    model::{self, Engine, Hosted, Model},
};

/// Adds our section. In a crash report no lock may be taken, so it is left out there.
pub(crate) fn add(ctx: &InfoContext, for_crash_report: bool) {
    if for_crash_report {
        return;
    }
    let (model, error) = match model::model() {
        Model::Loading => ("loading", String::new()),
        Model::Ready(_) => ("ready", String::new()),
        Model::Failed(problem) => ("failed", problem.replace(['\r', '\n'], " ")),
    };
    // A section that cannot be built is one that INFO was not asked for.
    let mut section = ctx.builder().add_section("engine");
    let texts = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("uptime_seconds", figures::uptime().as_secs().to_string()),
        ("model", model.to_owned()),
        ("model_error", error),
    ];
    let texts = texts.into_iter().map(|(name, text)| (name.to_owned(), text));
    let numbers = figures().into_iter().map(|(name, number)| (name.to_owned(), number.to_string()));
    for (name, value) in texts.chain(numbers).chain(latency::all().map(|told| percentiles(&told))) {
        let Ok(next) = section.field(&name, value) else { return };
        section = next;
    }
    for (i, model) in model::named().iter().enumerate() {
        let Ok(next) = section.field(&format!("model_{i}"), describe(model)) else { return };
        section = next;
    }
    let models = model::named();
    let engines =
        models.iter().flat_map(|model| model.engines().into_iter().map(move |it| (model, it)));
    for (i, (model, engine)) in engines.enumerate() {
        let Ok(next) = section.field(&format!("engine_{i}"), describe_engine(model, &engine))
        else {
            return;
        };
        section = next;
    }
    if let Ok(built) = section.build_section() {
        let _ = built.build_info();
    }
}

/// A line as the server's own latencystats have it.
fn percentiles(told: &latency::Told) -> (String, String) {
    let task = told.asked.name().trim_matches(['<', '>']);
    let name = format!("latency_percentiles_usec_{}_{task}", told.phase);
    let at = |share| told.percentile(share);
    (name, format!("p50={:.3},p99={:.3},p99.9={:.3}", at(0.5), at(0.99), at(0.999)))
}

/// A model, and whether it is there.
fn describe(model: &Hosted) -> String {
    let state = match model.model() {
        Model::Loading => "loading",
        Model::Ready(_) => "ready",
        Model::Failed(_) => "failed",
    };
    format!("name={},state={state},default={}", model.name, u8::from(model::is_default(model)))
}

/// What an engine has done, and on what.
fn describe_engine(hosted: &Hosted, Engine { model, work }: &Engine) -> String {
    let (state, device) = match model {
        Model::Loading => ("loading", String::new()),
        Model::Ready(loaded) => ("ready", loaded.florence.device().to_owned()),
        Model::Failed(_) => ("failed", String::new()),
    };
    format!(
        "model={},state={state},answers={},steps={},busy_ms={},device={device}",
        hosted.name,
        work.answers.get(),
        work.steps.get(),
        work.busy_us.get() / 1000,
    )
}
