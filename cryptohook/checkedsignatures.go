package cryptohook

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"sync"

	"maunium.net/go/mautrix/id"
)

// checkedSignatures remembers which signatures were checked. A device sends its own keys, with their signatures, with each key of a session, and
// whether one is valid depends on nothing but on what and by whom it is: see digestOf. Two generations of a bounded size: what was not asked for
// while one was filled is forgotten.
type checkedSignatures struct {
	mu           sync.Mutex
	newer, older map[signatureDigest]bool
}

// signaturesInGeneration is how many signatures are in a generation: 33 bytes each.
const signaturesInGeneration = 10_000

// signatureDigest is a hash of all that the validity of a signature depends on.
type signatureDigest [sha256.Size]byte

// digestOf is the digest of the signature on a JSON object that is in the user's name, and by the key of that name.
func digestOf(object json.RawMessage, userID id.UserID, keyName string, key id.Ed25519) signatureDigest {
	return hashOfParts(userID.String(), keyName, key.String(), string(object))
}

// hashOfParts hashes texts, each with its length before it.
func hashOfParts(parts ...string) [sha256.Size]byte {
	hash := sha256.New()
	for _, part := range parts {
		_ = binary.Write(hash, binary.BigEndian, uint64(len(part)))
		hash.Write([]byte(part))
	}
	return [sha256.Size]byte(hash.Sum(nil))
}

// signedBy is signedBy, once for the same; nil remembers nothing.
func (c *checkedSignatures) signedBy(object json.RawMessage, userID id.UserID, key id.Ed25519) bool {
	if c == nil {
		return signedBy(object, userID, key)
	}
	return c.valid(digestOf(object, userID, key.String(), key), func() bool { return signedBy(object, userID, key) })
}

// valid says whether a signature is valid, as check finds it at the first time.
func (c *checkedSignatures) valid(digest signatureDigest, check func() bool) bool {
	valid, known := c.look(digest)
	if !known {
		valid = check() // without the lock: others check others
		c.mu.Lock()
		defer c.mu.Unlock()
		c.keep(digest, valid)
	}
	return valid
}

func (c *checkedSignatures) look(digest signatureDigest) (valid, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if valid, known = c.newer[digest]; known {
		return valid, true
	}
	if valid, known = c.older[digest]; known {
		c.keep(digest, valid)
	}
	return valid, known
}

// keep puts what is known into the newer generation. The caller holds mu.
func (c *checkedSignatures) keep(digest signatureDigest, valid bool) {
	if len(c.newer) >= signaturesInGeneration || c.newer == nil {
		c.newer, c.older = make(map[signatureDigest]bool), c.newer
	}
	c.newer[digest] = valid
}
