// Package cryptohook tells a mautrix client who really sent each encrypted message.
//
// An encrypted message is only as trustworthy as the Megolm session that it came in, and that only as the device that made the
// session. The hook intercepts each m.room_key, derives its sender from the device's keys and the sender's cross-signing identity
// (the steps A–J of the Matrix Rust SDK's "sender data", see steps.go), stores what it found with the session, and gives every
// message a [Verdict] when its handler sees it: from what is stored, and from what the sender's identity is worth at that moment.
//
//	hook, err := cryptohook.Install(ctx, client, cryptohook.Options{DB: db, PickleKey: pickleKey})
//	if err != nil {
//		return err
//	}
//	client.Syncer.(mautrix.ExtensibleSyncer).OnEventType(event.EventMessage, func(ctx context.Context, evt *event.Event) {
//		verdict, ok := cryptohook.VerdictOf(evt)
//		if ok && verdict.Code == cryptohook.CodeVerified {
//			obey(verdict.UserID, evt.Content.AsMessage().Body)
//		}
//	})
//	return hook.Run(ctx)
//
// Before Run, the machine ([Hook.Machine]) should be given the account's cross-signing keys, for example by mautrix's
// VerifyWithRecoveryKey once the device's keys are published: nobody is ever verified without an identity of our own that vouches for
// them.
//
// # What it proves
//
// [CodeVerified] means: the message was encrypted in a session that a device made whose keys are signed by the sender's
// self-signing key, that by the sender's master key, and that by our own user-signing key; and the sender of the event is that
// user. [CodeUnverifiedIdentity] proves the same but for the last link: it is the account's own device, and nobody has checked
// whose account it is.
//
// # What it does not prove
//
// A homeserver can withhold messages, keys and key changes, and can invent an identity for a user whom nobody has verified. The
// first master key that it shows is believed until it changes ([CodeIdentityChanged]). Anybody who holds a session's key (every
// recipient) could forge a message's text towards somebody who lacks the message's signature; Megolm's signature is checked here,
// but it convinces nobody else. Stolen devices sign as well as owned ones.
//
// # How it stays true
//
// What is stored is judged again when anything about its sender is learnt, by whomever: a device is signed or a self-signing key is
// replaced, an identity is verified ([Hook.Verify], a pin, another device of the account), reset, or its verification is withdrawn
// ([Hook.WithdrawVerification]). A signature that was checked once stays evidence, whatever the server shows later. Whoever has told
// somebody a verdict sets [Options].OnChange and asks [Hook.Review] what it would be now.
//
// # How not to misuse it
//
// Do not act on a message whose code you do not know, and treat events without a verdict as unproven. Handlers see an event at
// least once: after a crash again, so make what they do repeatable. Do not call the machine's sync functions yourself.
//
// One process works with a database; [Install] sees to that. Where another may stand by, on PostgreSQL, call [Own] before you log in, give
// what it returns to Install, and begin anew there when Run ends with [ErrNotOwner]. Other tables in the same database are safe only if
// you write them by [Ownership.Write].
package cryptohook
