//! `config.json` and `generation_config.json`, in both published layouts.
//!
//! What fine-tunes leave out is taken from Florence-2's own shapes, as far as the tensors do not
//! tell it.

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::names::TABLES;

/// `config.json`, whatever it leaves out.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(default)]
    vision_config: VisionFields,
    #[serde(default)]
    text_config: TextFields,
    /// Only the native layout has it.
    image_token_id: Option<u32>,
    #[serde(flatten)]
    generation: GenerationFields,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct VisionFields {
    #[serde(alias = "embed_dim")]
    dim_embed: Option<Vec<usize>>,
    num_heads: Option<Vec<usize>>,
    num_groups: Option<Vec<usize>>,
    depths: Option<Vec<usize>>,
    patch_size: Option<Vec<usize>>,
    patch_stride: Option<Vec<usize>>,
    patch_padding: Option<Vec<usize>>,
    patch_prenorm: Option<Vec<bool>>,
    window_size: Option<usize>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct TextFields {
    d_model: Option<usize>,
    encoder_layers: Option<usize>,
    decoder_layers: Option<usize>,
    encoder_attention_heads: Option<usize>,
    decoder_attention_heads: Option<usize>,
    /// The original layout keeps the generation defaults here.
    #[serde(flatten)]
    generation: GenerationFields,
}

/// Sizes of the network.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) vision: VisionConfig,
    pub(crate) text: TextConfig,
}

/// DaViT, stage by stage.
#[derive(Debug, Clone)]
pub(crate) struct VisionConfig {
    pub(crate) dim_embed: Vec<usize>,
    pub(crate) num_heads: Vec<usize>,
    pub(crate) num_groups: Vec<usize>,
    pub(crate) depths: Vec<usize>,
    pub(crate) patch_size: Vec<usize>,
    pub(crate) patch_stride: Vec<usize>,
    pub(crate) patch_padding: Vec<usize>,
    pub(crate) patch_prenorm: Vec<bool>,
    pub(crate) window_size: usize,
}

/// BART.
#[derive(Debug, Clone)]
pub(crate) struct TextConfig {
    pub(crate) d_model: usize,
    pub(crate) encoder_layers: usize,
    pub(crate) decoder_layers: usize,
    pub(crate) encoder_attention_heads: usize,
    pub(crate) decoder_attention_heads: usize,
}

/// The generation settings that a file may give.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct GenerationFields {
    num_beams: Option<usize>,
    no_repeat_ngram_size: Option<usize>,
    early_stopping: Option<bool>,
    length_penalty: Option<f32>,
    #[serde(deserialize_with = "id")]
    forced_bos_token_id: Option<u32>,
    #[serde(deserialize_with = "id")]
    forced_eos_token_id: Option<u32>,
    #[serde(deserialize_with = "id")]
    decoder_start_token_id: Option<u32>,
    #[serde(deserialize_with = "id")]
    eos_token_id: Option<u32>,
}

/// An id, or the first of a list of them.
fn id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let value = match &value {
        Value::Array(ids) => ids.first(),
        value => Some(value),
    };
    Ok(value.and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok()))
}

/// Generation defaults of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationDefaults {
    /// Beams; 1 is greedy search.
    pub beams: usize,
    /// No n-gram of this length may occur twice; 0 switches the rule off.
    pub no_repeat_ngram: usize,
    /// Stop as soon as as many hypotheses as beams have ended.
    pub early_stopping: bool,
    /// Exponent of the length by which a hypothesis' log-probability is divided.
    pub length_penalty: f32,
    pub(crate) forced_bos: Option<u32>,
    pub(crate) forced_eos: Option<u32>,
    pub(crate) start: u32,
    pub(crate) eos: u32,
}

impl GenerationDefaults {
    /// One sentence on what a model with so many ids cannot do, if anything is.
    pub(crate) fn problem(&self, vocabulary: usize) -> Option<String> {
        let Self { beams, forced_bos, forced_eos, start, eos, .. } = self;
        if !(1..=MAX_BEAMS).contains(beams) {
            return Some(format!("num_beams is {beams}, not from 1 to {MAX_BEAMS}"));
        }
        let ids = [
            ("decoder_start_token_id", Some(*start)),
            ("forced_bos_token_id", *forced_bos),
            ("forced_eos_token_id", *forced_eos),
            ("eos_token_id", Some(*eos)),
        ];
        ids.into_iter().find_map(|(name, id)| {
            let id = id.filter(|id| *id as usize >= vocabulary)?;
            Some(format!("{name} is {id}, the model has only {vocabulary} ids"))
        })
    }

    /// The tokens that begin and end answers, in words, if they are others than these.
    pub(crate) fn other_ids(&self, bos: u32, eos: u32) -> Option<String> {
        let Self { forced_bos, forced_eos, start, eos: end, .. } = self;
        let is_other =
            *forced_bos != Some(bos) || [Some(*start), Some(*end), *forced_eos] != [Some(eos); 3];
        is_other.then(|| {
            let forced = |id: &Option<u32>| id.map_or("none".to_owned(), |id| id.to_string());
            format!(
                "start {start}, forced_bos {}, eos {end} and forced_eos {}",
                forced(forced_bos),
                forced(forced_eos)
            )
        })
    }

    /// Begins and ends answers as Florence-2 does, with these tokens.
    pub(crate) fn take_ids(&mut self, bos: u32, eos: u32) {
        (self.forced_bos, self.forced_eos) = (Some(bos), Some(eos));
        (self.start, self.eos) = (eos, eos);
    }
}

impl GenerationFields {
    /// What is not given here is as the others say.
    fn or(self, others: &Self) -> Self {
        Self {
            num_beams: self.num_beams.or(others.num_beams),
            no_repeat_ngram_size: self.no_repeat_ngram_size.or(others.no_repeat_ngram_size),
            early_stopping: self.early_stopping.or(others.early_stopping),
            length_penalty: self.length_penalty.or(others.length_penalty),
            forced_bos_token_id: self.forced_bos_token_id.or(others.forced_bos_token_id),
            forced_eos_token_id: self.forced_eos_token_id.or(others.forced_eos_token_id),
            decoder_start_token_id: self.decoder_start_token_id.or(others.decoder_start_token_id),
            eos_token_id: self.eos_token_id.or(others.eos_token_id),
        }
    }
}

impl ConfigFile {
    /// The effective generation defaults.
    ///
    /// The native layout takes them from `generation_config.json`. In the original layout that
    /// file is not what counts: the reference generates with the language model's own settings,
    /// which come from `text_config`.
    pub(crate) fn generation(&self, file: Option<GenerationFields>) -> GenerationDefaults {
        let text = &self.text_config.generation;
        let fields = match self.image_token_id {
            Some(_) => file.unwrap_or_default().or(&self.generation).or(text),
            None => text.clone(),
        };
        GenerationDefaults {
            beams: fields.num_beams.unwrap_or(3),
            no_repeat_ngram: fields.no_repeat_ngram_size.unwrap_or(3),
            early_stopping: fields.early_stopping.unwrap_or(true),
            length_penalty: fields.length_penalty.unwrap_or(1.0),
            forced_bos: Some(fields.forced_bos_token_id.unwrap_or(BOS)),
            forced_eos: Some(fields.forced_eos_token_id.unwrap_or(EOS)),
            start: fields.decoder_start_token_id.unwrap_or(EOS),
            eos: fields.eos_token_id.unwrap_or(EOS),
        }
    }

    /// All of it, with what the tensors of these shapes tell where the file does not; and the
    /// names of what had to be taken so.
    pub(crate) fn complete(
        &self,
        shape: impl Fn(&str) -> Option<Vec<usize>>,
    ) -> (Config, Vec<&'static str>) {
        let mut told = Told { shape, missing: Vec::new() };
        let vision = self.vision_config.clone().complete(&mut told);
        let text = self.text_config.clone().complete(&mut told);
        (Config { vision, text }, told.missing)
    }
}

/// What the tensors of a checkpoint tell, and what they were asked for.
struct Told<F> {
    shape: F,
    missing: Vec<&'static str>,
}

impl<F: Fn(&str) -> Option<Vec<usize>>> Told<F> {
    /// A field; one that the file does not have goes on the list.
    fn or<T>(&mut self, given: Option<T>, name: &'static str, own: impl FnOnce(&F) -> T) -> T {
        given.unwrap_or_else(|| {
            self.missing.push(name);
            own(&self.shape)
        })
    }
}

/// How many tensors of numbered names there are, one after the other.
fn count(name: impl Fn(usize) -> String, shape: impl Fn(&str) -> Option<Vec<usize>>) -> usize {
    (0..usize::MAX).take_while(|i| shape(&name(*i)).is_some()).count()
}

impl VisionFields {
    fn complete<F>(self, told: &mut Told<F>) -> VisionConfig
    where
        F: Fn(&str) -> Option<Vec<usize>>,
    {
        let conv = |i: usize| (told.shape)(&format!("vision_tower.convs.{i}.conv.weight"));
        let convs: Vec<Vec<usize>> = (0..).map_while(conv).collect();
        let sizes = |dim: usize| -> Vec<usize> {
            convs.iter().filter_map(|conv| conv.get(dim)).copied().collect()
        };
        let stages = 0..convs.len();
        let dim_embed = told.or(self.dim_embed, "dim_embed", |_| sizes(0));
        let heads: Vec<usize> = dim_embed.iter().map(|dim| dim / DAVIT_HEAD).collect();
        let patch_size = told.or(self.patch_size, "patch_size", |_| sizes(2));
        let blocks = |shape: &F, i: usize| {
            count(|b| format!("vision_tower.blocks.{i}.{b}.spatial_block.norm1.weight"), shape)
        };
        VisionConfig {
            num_heads: told.or(self.num_heads, "num_heads", |_| heads.clone()),
            num_groups: told.or(self.num_groups, "num_groups", |_| heads.clone()),
            depths: told.or(self.depths, "depths", |shape| {
                stages.clone().map(|i| blocks(shape, i)).collect()
            }),
            patch_stride: told.or(self.patch_stride, "patch_stride", |_| {
                stages.clone().map(|i| if i == 0 { 4 } else { 2 }).collect()
            }),
            patch_padding: told.or(self.patch_padding, "patch_padding", |_| {
                patch_size.iter().map(|size| size / 2).collect()
            }),
            patch_prenorm: told.or(self.patch_prenorm, "patch_prenorm", |_| {
                stages.clone().map(|i| i > 0).collect()
            }),
            window_size: told.or(self.window_size, "window_size", |_| WINDOW),
            dim_embed,
            patch_size,
        }
    }
}

impl TextFields {
    fn complete<F>(self, told: &mut Told<F>) -> TextConfig
    where
        F: Fn(&str) -> Option<Vec<usize>>,
    {
        let d_model = told.or(self.d_model, "d_model", |shape| {
            let table = TABLES.iter().find_map(|table| shape(table)).unwrap_or_default();
            table.get(1).copied().unwrap_or_default()
        });
        let layers = |side: &str, shape: &F| {
            count(|i| format!("text.{side}.layers.{i}.final_layer_norm.weight"), shape)
        };
        let heads = |_: &F| d_model / BART_HEAD;
        let encoder = self.encoder_layers;
        let encoder_layers = told.or(encoder, "encoder_layers", |shape| layers("encoder", shape));
        let decoder = self.decoder_layers;
        let decoder_layers = told.or(decoder, "decoder_layers", |shape| layers("decoder", shape));
        let (encoder, decoder) = (self.encoder_attention_heads, self.decoder_attention_heads);
        TextConfig {
            d_model,
            encoder_layers,
            decoder_layers,
            encoder_attention_heads: told.or(encoder, "encoder_attention_heads", heads),
            decoder_attention_heads: told.or(decoder, "decoder_attention_heads", heads),
        }
    }
}

/// Most beams of a search.
pub const MAX_BEAMS: usize = 16;

/// Channels of a head in every published DaViT, and of a group.
const DAVIT_HEAD: usize = 32;
/// Channels of a head in every published language model.
const BART_HEAD: usize = 64;
/// Height and width of a window of attention.
const WINDOW: usize = 12;
/// The ids of `<s>` and `</s>`.
const BOS: u32 = 0;
const EOS: u32 = 2;

impl Config {
    /// One sentence on what is inconsistent, if anything is.
    pub(crate) fn problem(&self) -> Option<String> {
        let VisionConfig {
            dim_embed,
            num_heads,
            num_groups,
            depths,
            patch_size,
            patch_stride,
            patch_padding,
            patch_prenorm,
            window_size,
        } = &self.vision;
        let stages = dim_embed.len();
        let lengths = [num_heads, num_groups, depths, patch_size, patch_stride, patch_padding]
            .map(Vec::len)
            .into_iter()
            .chain([patch_prenorm.len()]);
        if stages == 0 || lengths.into_iter().any(|length| length != stages) {
            return Some("the lists of vision_config differ in length or are empty".to_owned());
        }
        let divides = |part: usize, whole: usize| part > 0 && whole.is_multiple_of(part);
        for (dim, parts) in dim_embed.iter().zip(num_heads.iter().zip(num_groups)) {
            if !divides(*parts.0, *dim) || !divides(*parts.1, *dim) {
                return Some(format!("{dim} channels do not divide into the heads or groups"));
            }
        }
        let text = &self.text;
        for heads in [text.encoder_attention_heads, text.decoder_attention_heads] {
            if !divides(heads, text.d_model) {
                return Some(format!(
                    "d_model {} does not divide into {heads} heads",
                    text.d_model
                ));
            }
        }
        (*window_size == 0 || patch_stride.contains(&0) || patch_size.contains(&0))
            .then(|| "window_size, patch_size and patch_stride must not be 0".to_owned())
    }
}
