//! One name for a tensor, whatever layout the checkpoint has.

/// The projection of the native layout; Microsoft's has it transposed, under another name.
pub(super) const PROJECTION: &str = "projector.image_projection.weight";
pub(super) const PROJECTION_TRANSPOSED: &str = "projector.image_projection_transposed";

/// The tables of token embeddings: of prompts, of nothing, and of the decoder. Exports of tied ones
/// differ in which of them survives.
pub(super) const TABLES: [&str; 3] =
    ["text.shared.weight", "text.encoder.embed_tokens.weight", "text.decoder.embed_tokens.weight"];

/// What logits are made with; where it is not stored, the table.
pub(super) const HEAD: &str = "lm_head.weight";

/// One spelling for a tensor of either layout.
///
/// ORIG is Microsoft's layout, NAT the one of `florence-community` and newer transformers.
pub(super) fn canonical(name: &str) -> String {
    // ORIG writes the projection as a bare parameter that is multiplied from the right.
    if name == "image_projection" {
        return PROJECTION_TRANSPOSED.to_owned();
    }
    let name = name.strip_prefix("model.").unwrap_or(name);
    let name = name
        .strip_prefix("multi_modal_projector.")
        .map_or_else(|| name.to_owned(), |rest| format!("projector.{rest}"));
    if let Some(rest) = name.strip_prefix("language_model.") {
        return match rest.strip_prefix("model.") {
            Some(text) => format!("text.{text}"),
            None if rest.starts_with("lm_head.") || rest == "final_logits_bias" => rest.to_owned(),
            None => format!("text.{rest}"),
        };
    }
    if name.starts_with("image_proj_norm.") {
        return format!("projector.{name}");
    }
    if let Some(rest) = name.strip_prefix("image_pos_embed.") {
        return format!("projector.image_position_embed.{rest}");
    }
    if !name.starts_with("vision_tower.") {
        return name;
    }
    [
        (".proj.weight", ".conv.weight", "convs."),
        (".proj.bias", ".conv.bias", "convs."),
        (".fn.dw.", ".", ""),
        (".window_attn.norm.", ".norm1.", ""),
        (".channel_attn.norm.", ".norm1.", ""),
        (".ffn.norm.", ".norm2.", ""),
        (".window_attn.fn.", ".window_attn.", ""),
        (".channel_attn.fn.", ".channel_attn.", ""),
        (".ffn.fn.net.", ".ffn.", ""),
    ]
    .iter()
    .filter(|(_, _, only)| name["vision_tower.".len()..].starts_with(only))
    .fold(name.clone(), |name, (original, native, _)| name.replace(original, native))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_have_one_canonical_name() {
        let check = |original: &str, native: &str| {
            assert_eq!(canonical(original), canonical(native));
        };
        check("vision_tower.convs.0.proj.weight", "model.vision_tower.convs.0.conv.weight");
        check("vision_tower.convs.1.norm.bias", "model.vision_tower.convs.1.norm.bias");
        let block = "vision_tower.blocks.2.8";
        for (original, native) in [
            ("spatial_block.conv1.fn.dw.weight", "spatial_block.conv1.weight"),
            ("spatial_block.window_attn.norm.weight", "spatial_block.norm1.weight"),
            ("spatial_block.window_attn.fn.qkv.bias", "spatial_block.window_attn.qkv.bias"),
            ("spatial_block.window_attn.fn.proj.weight", "spatial_block.window_attn.proj.weight"),
            ("channel_block.channel_attn.fn.proj.bias", "channel_block.channel_attn.proj.bias"),
            ("channel_block.channel_attn.norm.bias", "channel_block.norm1.bias"),
            ("channel_block.conv2.fn.dw.bias", "channel_block.conv2.bias"),
            ("channel_block.ffn.norm.weight", "channel_block.norm2.weight"),
            ("channel_block.ffn.fn.net.fc1.weight", "channel_block.ffn.fc1.weight"),
        ] {
            check(&format!("{block}.{original}"), &format!("model.{block}.{native}"));
        }
        check("image_proj_norm.weight", "model.multi_modal_projector.image_proj_norm.weight");
        check(
            "image_pos_embed.row_embeddings.weight",
            "model.multi_modal_projector.image_position_embed.row_embeddings.weight",
        );
        check(
            "language_model.model.encoder.layers.0.fc1.weight",
            "model.language_model.encoder.layers.0.fc1.weight",
        );
        check("language_model.lm_head.weight", "lm_head.weight");
        assert_eq!(canonical("language_model.final_logits_bias"), "final_logits_bias");
    }
}
