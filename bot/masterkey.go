package bot

import "maunium.net/go/mautrix/id"

// ParseMasterKey reads a master key as people copy it, in groups with spaces between them, or with padding, into unpadded base64. The error
// ends a sentence that begins with the key.
func ParseMasterKey(text string) (id.Ed25519, error) { return parseMasterKey(text) }
