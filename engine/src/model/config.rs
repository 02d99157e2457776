//! `config.json` and `generation_config.json`, in both published layouts.

use serde::Deserialize;

/// Sizes of the network.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    #[serde(rename = "vision_config")]
    pub(crate) vision: VisionConfig,
    #[serde(rename = "text_config")]
    pub(crate) text: TextConfig,
    /// Only the native layout has it.
    image_token_id: Option<u32>,
}

/// DaViT, stage by stage.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct VisionConfig {
    #[serde(alias = "embed_dim")]
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
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct TextConfig {
    pub(crate) d_model: usize,
    pub(crate) encoder_layers: usize,
    pub(crate) decoder_layers: usize,
    pub(crate) encoder_attention_heads: usize,
    pub(crate) decoder_attention_heads: usize,
    /// The original layout keeps the generation defaults here.
    #[serde(flatten)]
    generation: GenerationFields,
}

/// The generation settings that a file may give.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct GenerationFields {
    num_beams: Option<usize>,
    no_repeat_ngram_size: Option<usize>,
    early_stopping: Option<bool>,
    length_penalty: Option<f32>,
    forced_bos_token_id: Option<u32>,
    forced_eos_token_id: Option<u32>,
    decoder_start_token_id: Option<u32>,
    eos_token_id: Option<u32>,
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

impl Config {
    /// The effective generation defaults.
    ///
    /// The native layout takes them from `generation_config.json`. In the original layout that
    /// file is not what counts: the reference generates with the language model's own settings,
    /// which come from `text_config`.
    pub(crate) fn generation(&self, file: Option<GenerationFields>) -> GenerationDefaults {
        let fields = match (self.image_token_id, file) {
            (Some(_), Some(file)) => file,
            _ => self.text.generation.clone(),
        };
        GenerationDefaults {
            beams: fields.num_beams.unwrap_or(3),
            no_repeat_ngram: fields.no_repeat_ngram_size.unwrap_or(3),
            early_stopping: fields.early_stopping.unwrap_or(true),
            length_penalty: fields.length_penalty.unwrap_or(1.0),
            forced_bos: Some(fields.forced_bos_token_id.unwrap_or(0)),
            forced_eos: Some(fields.forced_eos_token_id.unwrap_or(2)),
            start: fields.decoder_start_token_id.unwrap_or(2),
            eos: fields.eos_token_id.unwrap_or(2),
        }
    }

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
