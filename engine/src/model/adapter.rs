//! A PEFT adapter's files: which tensors change which weights, and how much.
//!
//! An adapter is `adapter_config.json` beside `adapter_model.safetensors` or `adapter_model.bin`.
//! Its tensors are named after the modules of the network that it was trained on, in either layout
//! (`base_model.model.<module>.lora_A.weight`); they are matched by their canonical names, so
//! that an adapter of one layout fits weights of the other. Every tensor must match: what is left
//! over would be missing in the answers. `lora` does the arithmetic, `weights` asks for both.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::Tensor;
use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Checkpoint, LoadError,
    lora::{Change, Lora},
    names::canonical,
    weights::Entry,
};

pub(crate) const CONFIG: &str = "adapter_config.json";
const SAFETENSORS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";

/// Settings that do more than add a product to a weight.
const BEYOND: [&str; 9] = [
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
];

/// Ways of starting that take something from the weights, which is then missing in them.
const SUBTRACTING: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

/// `adapter_config.json`, as far as it counts here.
#[derive(Debug, Deserialize)]
struct Settings {
    peft_type: String,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    use_rslora: Option<bool>,
    rank_pattern: Option<Map<String, Value>>,
    alpha_pattern: Option<Map<String, Value>>,
    modules_to_save: Option<Vec<String>>,
    init_lora_weights: Option<Value>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// An adapter's directory.
pub(super) struct Adapter {
    directory: PathBuf,
    settings: Settings,
}

/// What a tensor of an adapter is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    A,
    B,
    Bias,
    Magnitude,
    /// A parameter of the module itself, in place of the checkpoint's.
    Whole,
}

const SUFFIXES: [(&str, Part); 7] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.bias", Part::Bias),
    (".lora_embedding_A", Part::A),
    (".lora_embedding_B", Part::B),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
];

/// The tensors that change one module.
struct Module {
    /// Its name as the adapter has it.
    name: String,
    parts: BTreeMap<Part, Entry>,
}

/// A tensor in place of the checkpoint's.
pub(super) struct Whole {
    pub(super) entry: Entry,
    /// Whether it is its module's alone, and not that of the modules that are tied to it.
    pub(super) is_copy: bool,
}

/// What an adapter does to a checkpoint, by canonical names.
pub(super) struct Plan {
    pub(super) whole: BTreeMap<String, Whole>,
    modules: BTreeMap<String, Module>,
}

impl Plan {
    /// The weights that it changes.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.whole.keys().chain(self.modules.keys()).map(String::as_str)
    }
}

impl Adapter {
    pub(super) fn read(directory: &Path) -> Result<Self, LoadError> {
        let files = Checkpoint::Directory(directory);
        files.check()?;
        let settings = files.read_json(CONFIG)?;
        let adapter = Self { directory: directory.to_owned(), settings };
        match adapter.settings.problem() {
            Some(problem) => Err(adapter.error(CONFIG, problem)),
            None => Ok(adapter),
        }
    }

    fn error(&self, file: &str, problem: String) -> LoadError {
        LoadError::Config { path: self.directory.join(file), problem }
    }

    /// The file of tensors.
    pub(super) fn file(&self) -> Result<PathBuf, LoadError> {
        let files = [SAFETENSORS, PICKLE].map(|name| self.directory.join(name));
        let found = files.into_iter().find(|path| path.exists());
        found.ok_or_else(|| {
            let problem = format!("there is neither {SAFETENSORS} nor {PICKLE} beside it");
            self.error(CONFIG, problem)
        })
    }

    /// Matches an adapter's tensors with weights, whose shapes `shape` tells.
    pub(super) fn plan(
        &self,
        entries: Vec<Entry>,
        shape: impl Fn(&str) -> Option<Vec<usize>>,
    ) -> Result<Plan, LoadError> {
        let mut plan = Plan { whole: BTreeMap::new(), modules: BTreeMap::new() };
        let (mut unmatched, mut grouped) = (Vec::new(), Vec::new());
        for entry in entries {
            if entry.name.contains(".original_module.") {
                // What a module that was trained as a copy was copied from.
                continue;
            }
            let name = entry.name.strip_prefix("base_model.model.").unwrap_or(&entry.name);
            let (module, part) = split(name);
            let weight = match part {
                Part::Whole => canonical(&module),
                _ => canonical(&format!("{module}.weight")),
            };
            let Some(shape) = shape(&weight) else {
                unmatched.push(entry.name);
                continue;
            };
            if part == Part::Whole {
                let is_copy = self.settings.saves(&module);
                plan.whole.insert(weight, Whole { entry, is_copy });
            } else if is_grouped(&shape) {
                grouped.push(module);
            } else {
                let new = || Module { name: module, parts: BTreeMap::new() };
                plan.modules.entry(weight).or_insert_with(new).parts.insert(part, entry);
            }
        }
        grouped.dedup();
        for (names, what) in [
            (unmatched, "these tensors belong to nothing in the checkpoint"),
            (grouped, "changes of convolutions in groups cannot be merged"),
        ] {
            if !names.is_empty() {
                return Err(self.problem(format!("{what}: {}", listed(&names))));
            }
        }
        if plan.names().next().is_none() {
            return Err(self.problem("there is no tensor in it".to_owned()));
        }
        Ok(plan)
    }

    /// An error about the tensors.
    fn problem(&self, problem: String) -> LoadError {
        let name = if self.directory.join(SAFETENSORS).exists() { SAFETENSORS } else { PICKLE };
        self.error(name, problem)
    }

    /// The changes of a plan, by canonical name; `shape` tells those of the weights, `read` gives
    /// an adapter's tensor in float32.
    pub(super) fn changes(
        &self,
        plan: &Plan,
        shape: impl Fn(&str) -> Option<Vec<usize>>,
        read: impl Fn(&Entry) -> Result<Tensor, LoadError>,
    ) -> Result<Vec<(String, Change)>, LoadError> {
        let mut changes = Vec::new();
        for (weight, Module { name, parts }) in &plan.modules {
            let part = |part| parts.get(&part).map(&read).transpose();
            let (Some(a), Some(b)) = (part(Part::A)?, part(Part::B)?) else {
                return Err(self.problem(format!("of {name} there is only A or B")));
            };
            let is_embedding = parts[&Part::A].name.ends_with(".lora_embedding_A");
            let (rank, scale) = self.settings.scale(name).map_err(|why| self.error(CONFIG, why))?;
            let lora = Lora { a, b, scale, magnitude: part(Part::Magnitude)?, is_embedding };
            let expected = shape(weight).unwrap_or_default();
            if !lora.fits(&expected, rank) {
                return Err(self.problem(format!(
                    "of {name}, A {:?} and B {:?} with rank {rank} do not fit the weight {expected:?}",
                    lora.a.dims(),
                    lora.b.dims(),
                )));
            }
            if let Some(bias) = part(Part::Bias)? {
                let target = canonical(&format!("{name}.bias"));
                if shape(&target).as_deref() != Some(bias.dims()) {
                    return Err(self.problem(format!("{name} has no bias that its bias fits")));
                }
                let bias = bias.affine(scale, 0.0).map_err(LoadError::Device)?;
                changes.push((target, Change::Bias(bias)));
            }
            changes.push((weight.clone(), Change::Weight(lora)));
        }
        Ok(changes)
    }
}

/// A module and what a tensor is to it; of a whole parameter, its own plain name.
fn split(name: &str) -> (String, Part) {
    for (suffix, part) in SUFFIXES {
        if let Some(module) = name.strip_suffix(suffix) {
            return (module.to_owned(), part);
        }
    }
    let plain = [".base_layer.", ".modules_to_save."];
    let name = plain.iter().fold(name.to_owned(), |name, part| name.replace(part, "."));
    (name, Part::Whole)
}

/// Whether it is the weight of a convolution that keeps channels apart.
fn is_grouped(shape: &[usize]) -> bool {
    matches!(shape, [outputs, 1, _, _] if *outputs > 1)
}

/// Names for a message, not too many.
fn listed(names: &[String]) -> String {
    const MOST: usize = 8;
    let shown = names[..names.len().min(MOST)].join(", ");
    match names.len().saturating_sub(MOST) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

impl Settings {
    /// One sentence on what cannot be merged, if there is anything.
    fn problem(&self) -> Option<String> {
        if self.peft_type != "LORA" {
            return Some(format!(
                "this is an adapter of kind {}; only LORA can be merged into the weights",
                self.peft_type
            ));
        }
        let is_set = |name: &&&str| match self.others.get(**name) {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::Array(values)) => !values.is_empty(),
            Some(Value::Object(values)) => !values.is_empty(),
            Some(_) => true,
        };
        if let Some(name) = BEYOND.iter().find(is_set) {
            return Some(format!("{name} cannot be merged into the weights"));
        }
        let start = self.init_lora_weights.as_ref().and_then(Value::as_str)?.to_lowercase();
        SUBTRACTING.iter().any(|name| start.starts_with(name)).then(|| {
            format!(
                "with init_lora_weights {start} the adapter fits changed weights only; \
                 PEFT saves it for the plain ones with path_initial_model_for_weight_conversion"
            )
        })
    }

    /// Whether a parameter's module was copied whole, and trained beside the one it was tied to.
    fn saves(&self, parameter: &str) -> bool {
        let mut modules = self.modules_to_save.iter().flatten();
        let parameter = format!(".{parameter}.");
        modules.any(|module| parameter.contains(&format!(".{module}.")))
    }

    /// A module's rank, and what its product is multiplied by.
    fn scale(&self, module: &str) -> Result<(usize, f64), String> {
        const DEFAULT: usize = 8;
        let rank = find(self.rank_pattern.as_ref(), module)?.and_then(Value::as_u64);
        let rank = rank.and_then(|rank| usize::try_from(rank).ok());
        let rank = rank.or(self.r).unwrap_or(DEFAULT);
        let alpha = find(self.alpha_pattern.as_ref(), module)?.and_then(Value::as_f64);
        let alpha = alpha.or(self.lora_alpha).unwrap_or(DEFAULT as f64);
        let divisor = rank as f64;
        let divisor = if self.use_rslora == Some(true) { divisor.sqrt() } else { divisor };
        Ok((rank, alpha / divisor))
    }
}

/// The value of the first pattern that matches the end of a module's name.
fn find<'a>(
    patterns: Option<&'a Map<String, Value>>,
    module: &str,
) -> Result<Option<&'a Value>, String> {
    for (pattern, value) in patterns.into_iter().flatten() {
        let matches = Regex::new(&format!(r"^(.*\.)?({pattern})$"))
            .and_then(|regex| regex.is_match(module))
            .map_err(|error| format!("'{pattern}' is not a pattern: {error}"))?;
        if matches {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings(value: Value) -> Settings {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_first_pattern_that_matches_decides() {
        let settings = settings(json!({
            "peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_rslora": null,
            "rank_pattern": {"encoder.layers.0.fc2": 2, "fc2": 8},
            "alpha_pattern": {"^language_model.*q_proj": 1, "q_proj": 2, "layers\\.[01]\\.fc1": 3},
        }));
        let check = |module: &str, rank: usize, scale: f64| {
            assert_eq!(settings.scale(module), Ok((rank, scale)), "{module}");
        };
        check("model.encoder.layers.0.fc2", 2, 8.0);
        check("model.decoder.layers.0.fc2", 8, 2.0);
        check("language_model.x.q_proj", 4, 0.25);
        check("model.x.q_proj", 4, 0.5);
        check("model.layers.1.fc1", 4, 0.75);
        check("model.layers.2.fc1", 4, 4.0);
        check("model.xfc2", 4, 4.0);
    }

    #[test]
    fn what_is_more_than_a_product_is_refused() {
        let problem = |name: &str, value: Value| {
            let mut all =
                json!({"peft_type": "LORA", "use_qalora": false, "layer_replication": null});
            all[name] = value;
            settings(all).problem()
        };
        assert_eq!(problem("init_lora_weights", json!(true)), None);
        assert_eq!(problem("init_lora_weights", json!("gaussian")), None);
        assert_eq!(problem("target_parameters", json!([])), None);
        for (name, value, expected) in [
            ("peft_type", json!("LOHA"), "kind LOHA"),
            ("init_lora_weights", json!("pissa_niter_4"), "init_lora_weights pissa_niter_4"),
            ("use_qalora", json!(true), "use_qalora"),
            ("layer_replication", json!([[0, 4]]), "layer_replication"),
            ("trainable_token_indices", json!({"shared": [1]}), "trainable_token_indices"),
        ] {
            let found = problem(name, value).unwrap();
            assert!(found.contains(expected), "{found}");
        }
    }

    #[test]
    fn tensors_are_named_after_their_modules() {
        for (name, module, part) in [
            ("a.q_proj.lora_A.weight", "a.q_proj", Part::A),
            ("a.q_proj.lora_B.bias", "a.q_proj", Part::Bias),
            ("a.shared.lora_embedding_B", "a.shared", Part::B),
            ("a.q_proj.lora_magnitude_vector", "a.q_proj", Part::Magnitude),
            ("a.q_proj.lora_magnitude_vector.weight", "a.q_proj", Part::Magnitude),
            ("a.q_proj.base_layer.bias", "a.q_proj.bias", Part::Whole),
            ("lm_head.modules_to_save.weight", "lm_head.weight", Part::Whole),
            ("lm_head.weight", "lm_head.weight", Part::Whole),
        ] {
            assert_eq!(split(name), (module.to_owned(), part));
        }
    }
}
