package cryptohook

import (
	"encoding/json"

	"maunium.net/go/mautrix/id"
)

// checkedSignatures remembers which signatures were checked, and whether they are valid. A device sends its own keys, with their signatures,
// with each key of a session, and whether one is valid depends on nothing but on what and by whom it is: see digestOf.
type checkedSignatures struct{ *digests }

func newCheckedSignatures() *checkedSignatures { return &checkedSignatures{newDigests()} }

// digestOf is the digest of all that the validity of a signature depends on: the one on a JSON object that is in the user's name, and by the
// key of that name.
func digestOf(object json.RawMessage, userID id.UserID, keyName string, key id.Ed25519) digest {
	return hashOfParts(userID.String(), keyName, key.String(), string(object))
}

// signedBy is signedBy, once for the same; nil remembers nothing.
func (c *checkedSignatures) signedBy(object json.RawMessage, userID id.UserID, key id.Ed25519) bool {
	if c == nil {
		return signedBy(object, userID, key)
	}
	return c.valid(digestOf(object, userID, key.String(), key), func() bool { return signedBy(object, userID, key) })
}

// valid says whether a signature is valid, as check finds it at the first time.
func (c *checkedSignatures) valid(signature digest, check func() bool) bool {
	valid, known := c.look(signature)
	if !known {
		valid = check() // without the lock: others check others
		c.keep(signature, valid)
	}
	return valid
}
