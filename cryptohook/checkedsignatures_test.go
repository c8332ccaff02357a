package cryptohook

import (
	"encoding/json"
	"fmt"
	"testing"
)

func TestCheckedSignaturesAreForgotten(t *testing.T) {
	c := newCheckedSignatures()
	checks, checksOfGood := 0, 0
	valid := func(name string) bool {
		return c.valid(digestOf(nil, "", name, ""), func() bool {
			if checks++; name == "good" {
				checksOfGood++
			}
			return name != "forged"
		})
	}
	for range 2 {
		if !valid("good") || valid("forged") {
			t.Error("a signature is taken for another")
		}
	}
	if checks != 2 {
		t.Errorf("%d checks of two signatures", checks)
	}
	for i := range 3 * digestsInGeneration {
		valid(fmt.Sprint(i))
		valid("good") // in use: kept
	}
	if checksOfGood != 1 {
		t.Errorf("what is in use was checked %d times", checksOfGood)
	}
	if size := len(c.newer) + len(c.older); size > 2*digestsInGeneration {
		t.Errorf("%d are remembered", size)
	}
	before := checks
	valid("good")
	valid("forged")
	if checks != before+1 {
		t.Errorf("%d checks: what is in use is to be remembered, and what is not forgotten", checks-before)
	}
}

func TestSignatureIsRememberedByAllThatItDependsOn(t *testing.T) {
	digests := map[digest]string{}
	for name, digest := range map[string]digest{
		"one":                digestOf(json.RawMessage("{}"), "@a", "k", "key"),
		"another object":     digestOf(json.RawMessage("[]"), "@a", "k", "key"),
		"another user":       digestOf(json.RawMessage("{}"), "@b", "k", "key"),
		"another key's name": digestOf(json.RawMessage("{}"), "@a", "l", "key"),
		"another key":        digestOf(json.RawMessage("{}"), "@a", "k", "yek"),
		"cut elsewhere":      digestOf(json.RawMessage("{}"), "@ak", "", "key"),
	} {
		if other, same := digests[digest]; same {
			t.Errorf("%s is taken for %s", name, other)
		}
		digests[digest] = name
	}
}

// Whose self-signing key has signed a device is checked when its first key comes, and not for each one after it.
func TestSelfSigningKeysSignatureIsCheckedOnce(t *testing.T) {
	w := newTrustWorld(t)
	alice := newActor("@alice:test").addDevice("ALICE")
	w.know(alice.owner)
	w.sync(syncPart{toDevice: []object{w.share(alice, newMegolm(trustRoom))}})
	sent := newSentKeys().read(rawJSON(alice.keys()))
	digest := digestOf(sent.embedded, alice.owner.userID, alice.owner.selfSigningKey().String(), alice.owner.selfSigningKey())
	if valid, known := w.hook.signatures.look(digest); !valid || !known {
		t.Errorf("the signature is known: %t, valid: %t", known, valid)
	}
	// What is remembered is what the next walk goes by.
	w.hook.signatures.keep(digest, false)
	session := newMegolm(trustRoom)
	w.sync(syncPart{toDevice: []object{w.share(alice, session)}})
	w.wantState(session, alice, StateRejected)
}
