//! The model description, as `config.json` of a Hugging Face directory gives it, for the `lfm2` and `lfm2_moe` families.
//!
//! Field names, aliases and rules follow `transformers` 5.17.0 (`models/lfm2`, `models/lfm2_moe`). Its class defaults for
//! sizes are those of one model or another, so every size must be given; only switches have defaults here.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The fields of `config.json` that matter here; others are ignored. Recipes hold the same, in RON.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct RawConfig {
    pub model_type: Option<String>,
    pub vocab_size: Option<u64>,
    pub hidden_size: Option<u64>,
    pub intermediate_size: Option<u64>,
    pub moe_intermediate_size: Option<u64>,
    pub num_hidden_layers: Option<u64>,
    pub num_attention_heads: Option<u64>,
    pub num_key_value_heads: Option<u64>,
    pub head_dim: Option<u64>,
    pub norm_eps: Option<f64>,
    pub rope_theta: Option<f64>,
    pub rope_parameters: Option<RopeParameters>,
    pub rope_scaling: Option<RopeParameters>,
    pub max_position_embeddings: Option<u64>,
    pub tie_word_embeddings: Option<bool>,
    pub tie_embedding: Option<bool>,
    pub conv_bias: Option<bool>,
    #[serde(rename = "conv_L_cache")]
    pub conv_l_cache: Option<u64>,
    pub layer_types: Option<Vec<String>>,
    pub full_attn_idxs: Option<Vec<u64>>,
    pub num_dense_layers: Option<u64>,
    pub num_experts: Option<u64>,
    pub num_experts_per_tok: Option<u64>,
    pub use_expert_bias: Option<bool>,
    pub norm_topk_prob: Option<bool>,
    pub routed_scaling_factor: Option<f64>,
    pub block_ff_dim: Option<u64>,
    pub block_auto_adjust_ff_dim: Option<bool>,
    pub block_ffn_dim_multiplier: Option<f64>,
    pub block_multiple_of: Option<u64>,
    pub eos_token_id: Option<TokenIds>,
    pub dtype: Option<String>,
    pub torch_dtype: Option<String>,
}

/// Rotary embedding parameters.
#[derive(Clone, Default, PartialEq, Debug, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct RopeParameters {
    pub rope_theta: Option<f64>,
    pub rope_type: Option<String>,
    /// The older name of `rope_type`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub legacy_type: Option<String>,
}

/// One token id or several.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIds {
    /// A single id.
    One(u32),
    /// A list.
    Many(Vec<u32>),
}

/// A consistent model description: everything that the graph depends on.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Config {
    /// `lfm2` or `lfm2_moe`.
    pub model_type: String,
    /// Vocabulary size.
    pub vocab: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// The layers, in order.
    pub layers: Vec<Layer>,
    /// Query heads.
    pub heads: u64,
    /// Key and value heads.
    pub kv_heads: u64,
    /// Size of one head.
    pub head_dim: u64,
    /// Epsilon of every RMSNorm.
    pub norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Taps of the short convolution.
    pub conv_taps: u64,
    /// Whether the projections and the convolution of a short-conv mixer have biases.
    pub conv_bias: bool,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Longest context the model was made for, if stated.
    #[serde(skip)]
    pub max_positions: Option<u64>,
    /// Token ids that end a sequence.
    #[serde(skip)]
    pub eos_tokens: Vec<u32>,
    /// Element type of the checkpoint, if stated.
    #[serde(skip)]
    pub dtype: Option<String>,
}

/// One layer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Layer {
    /// What mixes tokens.
    pub mixer: Mixer,
    /// What follows.
    pub feed_forward: FeedForward,
}

/// What mixes the tokens of a sequence.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Mixer {
    /// Gated short convolution.
    Conv,
    /// Grouped-query attention.
    Attention,
}

/// The second half of a layer.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub enum FeedForward {
    /// SwiGLU of this width.
    Dense(u64),
    /// Mixture of experts.
    Experts(Experts),
}

/// A mixture of experts.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Experts {
    /// Number of experts.
    pub count: u64,
    /// Experts a token.
    pub per_token: u64,
    /// Width of one expert.
    pub width: u64,
    /// Whether a bias takes part in the selection.
    pub bias: bool,
    /// Whether a token's weights are divided by their sum (plus 1e-6).
    pub normalise: bool,
    /// Factor on the weights.
    pub scaling: f64,
}

/// Everything that is wrong with a configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError(pub Vec<String>);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the model configuration is not usable:")?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  - {fault}"))
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// The text is no JSON of this form, or the model it describes is unknown or inconsistent.
    pub fn from_json(text: &str) -> Result<Config, ConfigError> {
        let raw: RawConfig = serde_json::from_str(text).map_err(|e| ConfigError(vec![e.to_string()]))?;
        Config::resolve(&raw)
    }

    /// Number of layers with attention.
    pub fn attention_layers(&self) -> usize {
        self.layers.iter().filter(|layer| layer.mixer == Mixer::Attention).count()
    }

    /// BLAKE3 of what the graph depends on, in hexadecimal. Names, token ids and element types do not count.
    pub fn hash(&self) -> String {
        let text = serde_json::to_string(self).expect("a configuration has only strings and numbers");
        blake3::hash(text.as_bytes()).to_hex().to_string()
    }

    /// Checks a description and fills in what follows from it.
    ///
    /// # Errors
    /// All faults at once.
    pub fn resolve(raw: &RawConfig) -> Result<Config, ConfigError> {
        let mut faults = Faults::default();
        let model_type = raw.model_type.clone().unwrap_or_default();
        let experts_family = match model_type.as_str() {
            "lfm2" => false,
            "lfm2_moe" => true,
            other => {
                let found = if other.is_empty() { "none".to_owned() } else { format!("`{other}`") };
                return Err(ConfigError(vec![format!(
                    "`model_type`: expected `lfm2` or `lfm2_moe`, found {found}; other models are not supported"
                )]));
            }
        };
        let vocab = faults.size("vocab_size", raw.vocab_size);
        let hidden = faults.size("hidden_size", raw.hidden_size);
        let count = faults.size("num_hidden_layers", raw.num_hidden_layers);
        let heads = faults.size("num_attention_heads", raw.num_attention_heads);
        let kv_heads = faults.size("num_key_value_heads", raw.num_key_value_heads);
        let conv_taps = faults.size("conv_L_cache", raw.conv_l_cache);
        if !heads.is_multiple_of(kv_heads) {
            faults.add(format!("`num_attention_heads` {heads} is not a multiple of `num_key_value_heads` {kv_heads}"));
        }
        if raw.head_dim.is_none() && !hidden.is_multiple_of(heads) {
            faults.add(format!("`hidden_size` {hidden} is not a multiple of `num_attention_heads` {heads}"));
        }
        let head_dim = raw.head_dim.unwrap_or(hidden / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            faults.add(format!("the head size must be even for rotary embedding, found {head_dim}"));
        }
        let norm_eps = raw.norm_eps.unwrap_or_else(|| faults.missing("norm_eps", 1e-5));
        if !(norm_eps.is_finite() && norm_eps >= 0.0) {
            faults.add(format!("`norm_eps`: expected a number of at least 0, found {norm_eps}"));
        }
        let rope = raw.rope_scaling.as_ref().or(raw.rope_parameters.as_ref());
        if let Some(kind) = rope.and_then(|r| r.rope_type.as_deref().or(r.legacy_type.as_deref()))
            && kind != "default"
        {
            faults.add(format!(
                "`rope_type`: expected `default`, found `{kind}`; scaled rotary embeddings are not supported"
            ));
        }
        let rope_theta = rope.and_then(|r| r.rope_theta).or(raw.rope_theta);
        let rope_theta = rope_theta.unwrap_or_else(|| faults.missing("rope_theta", 1e6));
        if !(rope_theta.is_finite() && rope_theta > 0.0) {
            faults.add(format!("`rope_theta`: expected a positive number, found {rope_theta}"));
        }
        let mixers = faults.mixers(raw, count, experts_family);
        let intermediate = raw.block_ff_dim.filter(|_| !experts_family).or(raw.intermediate_size);
        let dense_layers = if experts_family {
            raw.num_dense_layers.unwrap_or_else(|| faults.missing("num_dense_layers", 0)).min(count)
        } else {
            count
        };
        let dense_width = if dense_layers > 0 {
            let width = faults.size("intermediate_size", intermediate);
            if experts_family { width } else { faults.adjusted_width(raw, width) }
        } else {
            0
        };
        let experts = (dense_layers < count).then(|| faults.experts(raw));
        let layers = mixers
            .into_iter()
            .enumerate()
            .map(|(i, mixer)| {
                let feed_forward = match &experts {
                    Some(experts) if i as u64 >= dense_layers => FeedForward::Experts(experts.clone()),
                    _ => FeedForward::Dense(dense_width),
                };
                Layer { mixer, feed_forward }
            })
            .collect();
        faults.finish(Config {
            model_type,
            vocab,
            hidden,
            layers,
            heads,
            kv_heads,
            head_dim,
            norm_eps,
            rope_theta,
            conv_taps,
            conv_bias: raw.conv_bias.unwrap_or(false),
            tied_head: raw.tie_embedding.or(raw.tie_word_embeddings).unwrap_or(true),
            max_positions: raw.max_position_embeddings,
            eos_tokens: match &raw.eos_token_id {
                None => vec![],
                Some(TokenIds::One(id)) => vec![*id],
                Some(TokenIds::Many(ids)) => ids.clone(),
            },
            dtype: raw.dtype.clone().or_else(|| raw.torch_dtype.clone()),
        })
    }
}

/// The largest size that is taken for serious: products of three still fit 64 bits.
const MAX_SIZE: u64 = 1 << 20;
const MAX_LAYERS: u64 = 1 << 10;

#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, fault: String) {
        self.0.push(fault);
    }

    fn missing<V>(&mut self, name: &str, stand_in: V) -> V {
        self.add(format!("`{name}` is missing"));
        stand_in
    }

    /// A required positive size; 1 stands in for a faulty one.
    fn size(&mut self, name: &str, value: Option<u64>) -> u64 {
        let limit = if name == "num_hidden_layers" { MAX_LAYERS } else { MAX_SIZE };
        match value {
            None => self.missing(name, 1),
            Some(n) if n == 0 || n > limit => {
                self.add(format!("`{name}`: expected 1 to {limit}, found {n}"));
                1
            }
            Some(n) => n,
        }
    }

    fn mixers(&mut self, raw: &RawConfig, count: u64, experts_family: bool) -> Vec<Mixer> {
        let conv = |n| vec![Mixer::Conv; n as usize];
        if let Some(types) = &raw.layer_types {
            if types.len() as u64 != count {
                self.add(format!(
                    "`layer_types`: expected {count} entries (`num_hidden_layers`), found {}",
                    types.len()
                ));
                return conv(count);
            }
            let mut mixers = vec![];
            for (i, name) in types.iter().enumerate() {
                mixers.push(match name.as_str() {
                    "conv" => Mixer::Conv,
                    "full_attention" => Mixer::Attention,
                    other => {
                        self.add(format!("`layer_types[{i}]`: expected `conv` or `full_attention`, found `{other}`"));
                        Mixer::Conv
                    }
                });
            }
            return mixers;
        }
        match &raw.full_attn_idxs {
            Some(indices) if !experts_family => {
                let mut mixers = conv(count);
                for &i in indices {
                    match mixers.get_mut(i as usize) {
                        Some(mixer) => *mixer = Mixer::Attention,
                        None => self.add(format!("`full_attn_idxs`: expected layers below {count}, found {i}")),
                    }
                }
                mixers
            }
            _ => {
                self.add("`layer_types` is missing".to_owned());
                conv(count)
            }
        }
    }

    /// The width of a dense model's feed-forward: `transformers` takes two thirds, scales, and rounds up.
    fn adjusted_width(&mut self, raw: &RawConfig, width: u64) -> u64 {
        if !raw.block_auto_adjust_ff_dim.unwrap_or(true) {
            return width;
        }
        let multiple = self.size("block_multiple_of", Some(raw.block_multiple_of.unwrap_or(256)));
        let scaled = (raw.block_ffn_dim_multiplier.unwrap_or(1.0) * (2 * width / 3) as f64) as u64;
        self.size("adjusted `intermediate_size`", Some(scaled.div_ceil(multiple) * multiple))
    }

    fn experts(&mut self, raw: &RawConfig) -> Experts {
        let count = self.size("num_experts", raw.num_experts);
        let per_token = self.size("num_experts_per_tok", raw.num_experts_per_tok);
        if per_token > count {
            self.add(format!("`num_experts_per_tok` {per_token} exceeds `num_experts` {count}"));
        }
        let scaling = raw.routed_scaling_factor.unwrap_or(1.0);
        if !scaling.is_finite() {
            self.add(format!("`routed_scaling_factor`: expected a number, found {scaling}"));
        }
        Experts {
            count,
            per_token,
            width: self.size("moe_intermediate_size", raw.moe_intermediate_size),
            bias: raw.use_expert_bias.unwrap_or(true),
            normalise: raw.norm_topk_prob.unwrap_or(true),
            scaling,
        }
    }

    fn finish(self, config: Config) -> Result<Config, ConfigError> {
        if self.0.is_empty() { Ok(config) } else { Err(ConfigError(self.0)) }
    }
}
