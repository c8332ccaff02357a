package cryptohook

import (
	"crypto/sha256"
	"sync"
)

// checkedSignatures remembers which device keys objects were signed by their own device. A device sends the same object with each of its keys,
// and whether a signature is valid depends on nothing but the object, which names the user, the device, and the key that has signed it. Two
// generations of a bounded size: what was not asked for while one was filled is forgotten.
type checkedSignatures struct {
	mu           sync.Mutex
	newer, older map[[sha256.Size]byte]bool
}

// signaturesInGeneration is how many objects are in a generation: 33 bytes each.
const signaturesInGeneration = 10_000

// valid says whether the object is signed by its device, as check finds it at the first time.
func (c *checkedSignatures) valid(object []byte, check func() bool) bool {
	digest := sha256.Sum256(object)
	valid, known := c.look(digest)
	if !known {
		valid = check() // without the lock: others check others
		c.mu.Lock()
		defer c.mu.Unlock()
		c.keep(digest, valid)
	}
	return valid
}

func (c *checkedSignatures) look(digest [sha256.Size]byte) (valid, known bool) {
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
func (c *checkedSignatures) keep(digest [sha256.Size]byte, valid bool) {
	if len(c.newer) >= signaturesInGeneration || c.newer == nil {
		c.newer, c.older = make(map[[sha256.Size]byte]bool), c.newer
	}
	c.newer[digest] = valid
}
