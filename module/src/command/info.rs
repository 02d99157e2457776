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
    let model = model::model();
    let error = match &model {
        Model::Failed(problem) => problem.replace(['\r', '\n'], " "),
        Model::Loading | Model::Ready(_) => String::new(),
    };
    // A section that cannot be built is one that INFO was not asked for.
    let mut section = ctx.builder().add_section("engine");
    let texts = [
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("uptime_seconds", figures::uptime().as_secs().to_string()),
        ("model", model.state().to_owned()),
        ("model_error", error),
    ];
    let texts = texts.into_iter().map(|(name, text)| (name.to_owned(), text));
    let numbers = figures().into_iter().map(|(name, number)| (name.to_owned(), number.to_string()));
    for (name, value) in texts.chain(numbers).chain(latency::all().map(|told| percentiles(&told))) {
        let Ok(next) = section.field(&name, value) else { return };
        section = next;
    }
    let models = model::named();
    for (i, model) in models.iter().enumerate() {
        let Ok(next) = section.field(&format!("model_{i}"), describe(model)) else { return };
        section = next;
    }
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
    let (state, is_default) = (model.model().state(), model::is_default(model));
    format!("name={},state={state},default={}", model.name, u8::from(is_default))
}

/// What an engine has done, and on what.
fn describe_engine(hosted: &Hosted, Engine { model, work }: &Engine) -> String {
    let device = match model {
        Model::Ready(loaded) => loaded.florence.device(),
        Model::Loading | Model::Failed(_) => "",
    };
    format!(
        "model={},state={},answers={},steps={},busy_ms={},device={device}",
        hosted.name,
        model.state(),
        work.answers.get(),
        work.steps.get(),
        work.busy_us.get() / 1000,
    )
}
