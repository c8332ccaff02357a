package bot

import (
	"crypto/rand"
	"fmt"
	"math/big"
	"time"

	"maunium.net/go/mautrix/id"
)

// A homeserver can keep an operator's message back, and deliver it when it means something else. So what makes somebody verified is confirmed
// with a code that the bot has made for that one occasion, and has shown in an encrypted message only: who types it has seen the occasion.

// codeDigits is how long a code is: a message that was kept back has the right one in one of a million cases.
const codeDigits = 6

// secondThought is an operator's word that another one was against: it counts once it is said again, with the code.
type secondThought struct {
	userID    id.UserID
	masterKey id.Ed25519
	madeAt    time.Time
}

// newCode makes a code that is in no use.
func (v *verifications) newCode() string {
	limit := new(big.Int).Exp(big.NewInt(10), big.NewInt(codeDigits), nil)
	for {
		// From crypto/rand itself, whose readers never fail.
		number, err := rand.Int(rand.Reader, limit)
		if err != nil {
			panic(err)
		}
		code := fmt.Sprintf("%0*d", codeDigits, number)
		if v.thoughts[code] == nil && v.coded(code) == nil {
			return code
		}
	}
}

// coded is the verification that has that code, or nil.
func (v *verifications) coded(code string) *dialogue {
	for _, d := range v.open {
		if code != "" && d.code == code {
			return d
		}
	}
	return nil
}

// think remembers what an operator has to say again, and gives the code for it.
func (v *verifications) think(userID id.UserID, masterKey id.Ed25519) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	for code, thought := range v.thoughts {
		if thought.userID == userID {
			delete(v.thoughts, code)
		}
	}
	code := v.newCode()
	v.thoughts[code] = &secondThought{userID: userID, masterKey: masterKey, madeAt: v.clock()}
	return code
}

// forgetThoughts drops those that nobody has said again in time. It is called under the lock.
func (v *verifications) forgetThoughts() {
	for code, thought := range v.thoughts {
		if v.clock().Sub(thought.madeAt) >= verificationLasts {
			delete(v.thoughts, code)
		}
	}
}

// takeThought gives what an operator says again, if the code is for such a thing. A code counts once.
func (v *verifications) takeThought(o *order) *secondThought {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.forgetThoughts()
	userID, code, bad := o.given()
	thought := v.thoughts[code]
	if bad != nil || thought == nil || userID != "" && userID != thought.userID {
		return nil
	}
	delete(v.thoughts, code)
	return thought
}

// isCode says that a word of a command looks like a code.
func isCode(word string) bool {
	if len(word) != codeDigits {
		return false
	}
	for _, c := range word {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}
