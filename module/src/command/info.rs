//! `INFO florence`: the counters, and the state of the model.

use redis_module::InfoContext;

use super::inspect::figures;
use crate::model::{self, Engine, Model};

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
    let Ok(mut section) = ctx.builder().add_section("engine").field("model", model) else {
        return;
    };
    for (name, value) in figures() {
        let Ok(next) = section.field(name, value.to_string()) else { return };
        section = next;
    }
    for (i, engine) in model::engines().iter().enumerate() {
        let Ok(next) = section.field(&format!("engine_{i}"), describe(engine)) else { return };
        section = next;
    }
    let Ok(section) = section.field("model_error", error) else { return };
    if let Ok(built) = section.build_section() {
        let _ = built.build_info();
    }
}

/// What an engine has done, and on what.
fn describe(Engine { model, work }: &Engine) -> String {
    let (state, device) = match model {
        Model::Loading => ("loading", String::new()),
        Model::Ready(loaded) => ("ready", loaded.florence.device().to_owned()),
        Model::Failed(_) => ("failed", String::new()),
    };
    format!(
        "state={state},answers={},steps={},busy_ms={},device={device}",
        work.answers.get(),
        work.steps.get(),
        work.busy_us.get() / 1000,
    )
}
