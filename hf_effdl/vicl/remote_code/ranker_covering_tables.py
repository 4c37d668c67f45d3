"""Covering designs found by examples/benchmarks/covering_designs.py, folded up by their symmetry.

A line is `v m base blocks`: points are characters of ALPHABET, the first v // m * m of them in cycles of m, and
turning all cycles by 0, ..., m - 1 places makes a block into an orbit of blocks.
"""

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

# block size: one line for each number of points
DESIGNS = {
    3: """
10 3 189 156 249 258 346 012 678
11 3 39a 269 356 27a 025 238 678
12 3 467 08a 03b 027 056 7ab 45b 049
13 13 06b 589
14 1 7cd 2ad 678 17a 18c 38d 356 289 16d 124 18b 048 4ab 347 059 4bc 07b 469 25c 01d 06c 06a 45d 9ac \
26b 279 139 157 9bd 3ac 58a 35b 023
15 15 0be 57d 27c
16 3 4bd 27d 78c 07b 3ce 2cf 046 134 4ae 48f 479 0af 09c 79a 012
17 3 08f 18b 56e abc 14e cfg 13a 19c 04c 7de 457 17g 67b 5af 5bg 012
18 9 1ef 13d 9bf 039 04b 23a
19 19 aeh 02b 78d
20 6 0de 8di 69c aej 068 3cf 03a 15a 23d 0ij 6bd dfh
21 21 9fk 578 3cg 6dk
22 3 19l 4de 1ag 8ah dik 69e 148 1jl abj fgj bcf 45b 23j 289 27i 46i 8cl afk 78k 3hl 47h 12c 0cg 05h \
7df 4dj 49c
23 5 bef 57h ejk 17k 12g 59c 9fl 07c 2jm ghj 5bi 0ae 1eh 9dm 025 0bl 09i klm
24 24 7ci 79l 12m 6en
25 25 aio 01l 2cf 7eg
26 5 26l 3ah 57b 139 78o 5ip 3cf 27h 09m jkl fhk 29i dln 8bm 9ep 1bc aco 34o 7ef eim 0di 6hi 1op
27 27 4bp ikn 8ck 01h 5en
28 9 48o 4hi noq 0aj 46d bjn ahr 19n 1cp 3kr 4gm 5ab 01l 9ep beh 036
29 9 eln 6qs hrs ahm 4cg 18m ijm 349 9ak 4dq 15k 5gm 28f 1bj 7nr adg
30 30 07m 03e 6aj hmn gis
31 31 9lp 025 8gp ahn 0ab
32 10 7ao 23s 02b iku 3bj klr 5jp 17p efp 38a clv 9ej 69s 3oq biq 3uv bfs lqu
33 33 efk csu 269 8iw 7fr 8ju
34 33 0hx ers 58e 5qv 0im lnv
35 7 5mt 3gu mvx 6or bhy bmo 3fi 8cm 1hr jsy cvy hju 1cu fjq jkp 29j 8nt 247 gop 2am 25u 5gs 01n cdk \
clt 5bv 4di nsx ace
36 9 38r gjm 6ew 2rv 2gh 2ey 4bl 6gs adt 124 8ij got giv dqr 6jl 2nw itu 5jn 3cj 6gx 3eg cgl ntv ptw
37 37 5mx hnA 6sv 5ls 4ce stx
39 39 5nu hpy 14k 9bl 37v abg cpC
40 8 57a djr ewz hqs npz inA cos 2gs 5oA 8cg 27o beA 2ab ehj 4im 3qD 26j fqz 3dw gxD 7bs 8vD 3jz 9jx \
7vB acj 2lm dqv ozD lrs 128 6wD 6mx 7mr
41 20 9hl 9CD lnt 2cz 2iD 136 29r fgm 2gu ikx rwA 6mp 2bm nxE 5fE
42 21 aBD jnu luF jCF 67m 1df irw 7oF 69r 1ci bly eyE bgn 2fD
43 43 iyG 2CF 6wy 9tG 9ky 4dp yDE
45 45 2AI hrx 9dq 9sE ovx dBC 3pH etI
46 15 8xG bCE gqE dnr 69J 9uB rvJ giF 5en mst agA 7rG 2il 3eq 0ev 0ds 9kw pyC 9gG jBE 5cG iyz 5mI \
05a wBG
47 15 4DF cnB 9ns aGH 06g 2nH uJK jks 3iJ 7kF 26e 2jm 9lK tvC iAE cel 2vE ehG moB rCH 12w 8gz jnv \
1BE 49e
48 48 rwy hqE csy 6AK lmy quJ 9cx alF
49 49 dmt 6aG noI 47t kzK rwK 24H 4gL
51 51 nJM 9lI 2wG 489 2gy hjp 2bC 2fm 3kB
52 13 1mO brG 08L byP 1gL CFI 0gF 3hP 6ef vxy 4gA fmq AHN 79a hqI mpz ksw zJK 7oK 8ej 7rN iLP 5HM \
1aw 0iB 7tz 8xC yKM 29A akA jnB doO 3nE oqL 3gM
54 54 CPR jqL 0bC 6es aFJ pvH oxy eMP 0ot
55 55 bpx 6qJ DJN 2AD abB 1eD 7CR lxI INP
57 56 8lx fIQ fhm ptE ewz 8uE 56J 5CL djD mOU
58 57 hHK 4GR vLU bns uwJ MQV jRS cjT vNT jKU
59 29 kou ptw kSW 9bo 2NV yFJ 3an 6cV his gxR mLR 4wU 3xH 5qR xKM 5hT lFR ftV 5ay ilx
60 19 2ft vOP hJO mKO 1gB kvS DJT aij AGW hrI 89x wHS euK 9zJ twy 6tO cov 6jU 79L 9MX 6bW 6LS kou \
grR gOV fxJ hFH 7mN mVX stH 47g 3pC VWX
""",
    4: """
9 4 0278 1357 0123 4567
11 11 0678
12 12 067a
13 13 1568
15 1 014a 1367 247c 06bc 7abe 0238 39ce 35ad 456e 02de 348b 0579 269a 189e 49bd 125b 678d 58ac 01cd
17 8 38cf 037e 5dfg 1357
18 7 48ef 578a 39gh 023a efgh
19 6 056a bchi 467g 3ceh 7acf 14eh 135i
21 4 12fj 5afj 489g 0ack 9cdj 345b 07fg 26hk 57ce 138a 89ab ghij
22 6 3bdk 78ae 4bfl 5deh 59ci 59ej 0136 ijkl
23 23 05bl 034c
25 12 abhm 58ai 3hjk 4adj 048o eimo 0369
27 9 aiko 1dop 27bk 8dek 356m 4ceh 38an
28 8 0dhp 127d 5ehq 5flo 6ajr 69de 26gh 8egl hjln opqr
29 4 bcps 9cjq 7ior 469a 36js 18ln 09lp 56fm cghk 26dp 7cjl 19gi 234c 0nps 0aci 7hmp 9dno 13pr klmn \
cdef 89ab
30 30 fhor 1hin 48jn
31 9 6dou 3kmq 8cnt 8bkr 57fi 038e cdiq 09ps 9bfj rstu
32 15 4beg 48ah 23ms 6ruv 5lns 9kno
35 35 cgor dijw 3dtv
37 37 12fi 79di 5fnu
40 40 8bmo 0flm 4cgl 5fpz
44 44 2huE 16ad 24st 6ksG 7itE
49 49 ikDE 16eE 6kvB 2zIL
""",
    5: """
9 2 01245 05678 23678
10 5 13459 56789
11 6 0235a 02478 13569 6789a
12 3 13579 0169a 2568a
15 1 4679b 12489 13abc 0137c 236cd 578bd 348ce 029be 3459c 0568a 049ad 156de 257ae
16 3 2568d 469ab 279df 045ef 02bde
17 17 026eg
18 18 4bdeh
19 19 69afh
21 21 1befk
22 3 0169k 4bgil 67cfj 69adg 138el 23479 09efi 14dfh 4cejk
23 21 48hjk 07elm
25 24 35ijm 5bhno
26 12 0ahim 56ajl eimop 258bo cfilp 147ap
27 5 08hpq 24efi 0dfko 7abik 69ijk 128kn ejmpq 378ce
28 14 45bmq 35adj dinpq
29 8 acdgh 67ajo 03aiq 4blpr 46chk 26bfs gikms opqrs
30 15 1bcor 57dmr 6gopr 0369c
31 10 5degl 12hmo 36agk 3jlms 16diu ejkpu 13579
32 9 4aqsv 235bg 27jlm eghmq 3fjrt 17hju rstuv
33 16 0fkor 3adkp 7acpq jlrtw 37bfw
34 4 9gknt 19des 12krv 16ejl hmvwx 7dhrt 5bens 6bhko 1fhis 07abj 2bdqw 1bmot 5cjor 67nov 0246x cekmx \
9bprx ghijx stuvx 4567w
35 17 abeqw 46aen 9ehjy 7iluv
36 36 04djz 1jqtv
37 37 4cgux 46sxy
38 38 8nuwA 0bcux
39 39 0efin 79tzA
40 40 9btwC ahimw 08gow
41 40 2abeA 46brx 7hrBE
42 5 2gvwA acjvB 9deoy dilDF 9bknq 13jkl 8ehrt 14abr 05dAB eswEF kotwz 0rwyA 8imvE 7efkv 4gkrD 017px \
19gEF 5gpzC iqwzE 48kuB 56789 fghij pqrst
43 42 014gA 02jxB 9huCG
44 6 1bpqF 3ipAH 78ciD 01crw bcgtE lpxCG cdovC 8pruv 8bekv 07ftF fimnv 136jD gklqt nxABD 157il 5dyAH \
1avyz 14ehG 79bGH
46 23 04afA 5jzBG 8rvFG acduB 07tzC
47 15 017mr 24CGH 2iuBD 0sIJK flosD 1iqvH 8dlmI 03eiw
48 16 5anvL 9hivK 04eHI glDHK 4ghqA 019gk 8xDFI 03hyC
50 25 08szK ghzDF 1knwy 02eiI 5yBJK 27chm qvAFK
""",
    10: """
22 21 12689dfgkl
24 4 1246dfhilm 1389abhjln 45679bcdef
27 2 3689bfhijl 23456bdgpq 038cdejkop 1458ejkmnq 0126bcgmno 67abefghkl
29 3 12568cefpr 358bfgkmpq 059dfinprs 289acijlns
31 3 235cegioqt 247bdglmnp 567abejqru 017befhitu ijklmnrstu
33 3 789bfglmst 58gjknpqru 139abcjmpv 0348egnrvw 128cdginor
""",
}
