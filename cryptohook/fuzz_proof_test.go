package cryptohook

import (
	"encoding/json"
	"os"
	"slices"
	"testing"

	"maunium.net/go/mautrix/id"
)

// readProof gives a proof that was made once, and the master key of the bot that made it.
func readProof(t testing.TB) (file []byte, masterKey id.Ed25519) {
	t.Helper()
	file = must(os.ReadFile("testdata/proof.json"))
	var proof proofFile
	if err := json.Unmarshal(file, &proof); err != nil {
		t.Fatal(err)
	}
	return file, must(parseCrossSigningKey(proof.Bot.MasterKey, proof.Bot.UserID, id.XSUsageMaster))
}

// FuzzProof: what is done to a proof, by a flipped byte or by anything else, is refused with a fault, unless it means the same.
func FuzzProof(f *testing.F) {
	good, masterKey := readProof(f)
	if _, err := VerifyProof(good, masterKey); err != nil {
		f.Fatal(err)
	}
	want := canonicalOf(good)
	f.Add(0, byte(1), []byte{})
	f.Add(len(good)/2, byte(0x20), []byte(`,"more":1`))
	f.Add(len(good)-2, byte(0), []byte(`}`))
	f.Add(3, byte(0), []byte(`"version":1,`))
	f.Add(1, byte(0), []byte(" \t\r\n"))
	f.Fuzz(func(t *testing.T, at int, flip byte, insert []byte) {
		if at < 0 || at >= len(good) || len(insert) > 1000 {
			t.Skip()
		}
		changed := slices.Insert(slices.Clone(good), at, insert...)
		changed[at] ^= flip
		checkFlipped(t, masterKey, want, changed)
	})
}
